"""Megatron-Core's pipeline schedules: the order of passes and transfers of every rank.

Source: megatron/core/pipeline_parallel/schedules.py and combined_1f1b.py of Megatron-Core 0.19.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_bench.projection.schedule.program import (
    Compute,
    Instruction,
    Links,
    Post,
    Tensor,
    Wait,
    Work,
    exchange,
    existing,
    links_of,
)
from moe_bench.projection.schedule.shape import Pass, PassKind, ScheduleKind, ScheduleShape


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferRule:
    """When a rank stands still for its transfers."""

    overlaps: bool
    """`overlap_p2p_comm`: between warm-up and flush, transfers run beside compute."""
    waits_for_sends: bool
    """Of these, a rank waits until its activation is sent: `deallocate_pipeline_outputs` since 0.19."""


def schedule_table(shape: ScheduleShape) -> tuple[tuple[int, int], ...]:
    """(micro batch, virtual stage) of every forward pass of a rank, in order (get_schedule_table)."""
    batches, group = shape.num_micro_batches, shape.group_size
    return tuple(
        (batch, stage)
        for first in range(0, batches, group)
        for stage in range(shape.num_virtual)
        for batch in range(first, min(first + group, batches))
    )


def num_warm_up_passes(shape: ScheduleShape, rank: int) -> int:
    """Forward passes before the first backward pass (get_pp_rank_microbatches).

    1F1B: PP - rank - 1. Interleaved: 2 (PP - rank - 1) + (VPP - 1) G; one more with merged passes.
    """
    after = shape.num_ranks - rank - 1
    if shape.num_virtual > 1:
        after = 2 * after + (shape.num_virtual - 1) * shape.group_size
    merges = shape.kind is ScheduleKind.INTERLEAVED_EP_OVERLAP
    return min(after + merges, shape.num_micro_batches * shape.num_virtual)


def rank_order(shape: ScheduleShape, rank: int) -> tuple[Work, ...]:
    """Every slot of `rank`: warm-up, one forward and one backward pass in turn, flush."""
    forward, backward = _passes(shape, rank)
    num_warm_up = num_warm_up_passes(shape, rank)
    order: list[Work] = [(one,) for one in forward[:num_warm_up]]
    for pair in zip(forward[num_warm_up:], backward, strict=False):
        order += [pair] if shape.kind is ScheduleKind.INTERLEAVED_EP_OVERLAP else [(one,) for one in pair]
    return (*order, *((one,) for one in backward[len(forward) - num_warm_up :]))


def rank_program(shape: ScheduleShape, rank: int, rule: TransferRule) -> tuple[Instruction, ...]:
    """The passes of `rank` with its transfers where Megatron-Core posts them and waits for them."""
    links = links_of(shape)
    if shape.num_ranks == 1:
        return tuple(Compute(work) for work in rank_order(shape, rank))
    if shape.num_virtual == 1:
        return tuple(_plain_program(shape, rank, links))
    return tuple(_interleaved(shape, rank, rule, links).program())


def _passes(shape: ScheduleShape, rank: int) -> tuple[list[Pass], list[Pass]]:
    """Forward and backward passes in their orders; backward, the virtual stages come last to first."""
    table, last_stage = schedule_table(shape), shape.num_virtual - 1
    forward = [Pass(PassKind.FORWARD, stage * shape.num_ranks + rank, batch) for batch, stage in table]
    backward = [
        Pass(PassKind.BACKWARD, (last_stage - stage) * shape.num_ranks + rank, batch)
        for batch, stage in table
    ]
    return forward, backward


def _plain_program(shape: ScheduleShape, rank: int, links: Links) -> list[Instruction]:
    """forward_backward_pipelining_without_interleaving: every transfer is waited for at once."""
    forward, backward = _passes(shape, rank)
    num_warm_up = num_warm_up_passes(shape, rank)
    num_steady = len(forward) - num_warm_up
    program: list[Instruction] = []
    for one in forward[:num_warm_up]:
        program += exchange([], [links.tensor_read(one)])
        program += [Compute((one,)), *exchange([links.tensor_made(one)], [])]
    if num_steady:
        program += exchange([], [links.tensor_read(forward[num_warm_up])])
    for index in range(num_steady):
        ahead, back = forward[num_warm_up + index], backward[index]
        program += [Compute((ahead,)), *exchange([links.tensor_made(ahead)], [links.tensor_read(back)])]
        following = forward[num_warm_up + index + 1 : num_warm_up + index + 2]
        program += [
            Compute((back,)),
            *exchange([links.tensor_made(back)], [links.tensor_read(one) for one in following]),
        ]
    for one in backward[num_steady:]:
        program += exchange([], [links.tensor_read(one)])
        program += [Compute((one,)), *exchange([links.tensor_made(one)], [])]
    return program


@dataclass(frozen=True, slots=True, kw_only=True)
class _InterleavedRank:
    """forward_backward_pipelining_with_interleaving on one rank."""

    shape: ScheduleShape
    rule: TransferRule
    links: Links
    forward: Sequence[Pass]
    backward: Sequence[Pass]
    activations: Sequence[Tensor | None]
    """What Megatron-Core receives while it sends what each forward pass made."""
    gradients: Sequence[Tensor | None]
    """The same for each backward pass."""
    num_warm_up: int

    def program(self) -> list[Instruction]:
        links, num_steady = self.links, len(self.forward) - self.num_warm_up
        first_gradient = links.tensor_read(self.backward[0])
        program = exchange([], [links.tensor_read(self.forward[0])])
        for index in range(self.num_warm_up):
            is_last = index == self.num_warm_up - 1 and num_steady > 0
            program += self._warm_up(index, first_gradient if is_last else None)
        for index in range(num_steady):
            program += self._overlapped_pair(index) if self.rule.overlaps else self._blocking_pair(index)
        if not num_steady:
            program += exchange([], [first_gradient])
        for index in range(num_steady, len(self.backward)):
            one = self.backward[index]
            program += [Compute((one,)), *exchange([links.tensor_made(one)], [self.gradients[index]])]
        return program

    def _warm_up(self, index: int, first_gradient: Tensor | None) -> list[Instruction]:
        links, one = self.links, self.forward[index]
        sends, receives = [links.tensor_made(one)], [self.activations[index]]
        if self.rule.overlaps:
            posted = [Post((), (first_gradient,))] if first_gradient is not None else []
            return [Compute((one,)), *exchange(sends, receives), *posted]
        return [Compute((one,)), *exchange(sends, [*receives, first_gradient])]

    def _blocking_pair(self, index: int) -> list[Instruction]:
        ahead, back = self.forward[self.num_warm_up + index], self.backward[index]
        links = self.links
        sends = [links.tensor_made(ahead), links.tensor_made(back)]
        receives = [self.activations[self.num_warm_up + index], self.gradients[index]]
        return [*self._computed(ahead, back), *exchange(sends, receives)]

    def _overlapped_pair(self, index: int) -> list[Instruction]:
        """Post each transfer behind its pass; before the next one of its kind, the send must be complete.

        A merged slot posts both ahead of its last weight gradient, and waits for its activation on the stream
        of dispatch and combine (TransformerModelChunkSchedulePlan.run).
        """
        links, ahead_index = self.links, self.num_warm_up + index
        ahead, back = self.forward[ahead_index], self.backward[index]
        awaited = ahead if self.rule.waits_for_sends else self.forward[ahead_index - 1]
        behind_forward: list[Instruction] = [
            Post(
                existing([links.tensor_made(ahead)]), existing([self.activations[ahead_index]]), self._merges
            ),
            Wait(existing([links.tensor_made(awaited)]), is_beside=self._merges),
        ]
        behind_backward: list[Instruction] = [
            Post(existing([links.tensor_made(back)]), existing([self.gradients[index]]), self._merges),
            Wait(existing(links.tensor_made(one) for one in self.backward[max(0, index - 1) : index])),
        ]
        first, *second = self._computed(ahead, back)
        return [first, *behind_forward, *second, *behind_backward]

    @property
    def _merges(self) -> bool:
        return self.shape.kind is ScheduleKind.INTERLEAVED_EP_OVERLAP

    def _computed(self, ahead: Pass, back: Pass) -> list[Compute]:
        if self._merges:
            return [Compute((ahead, back))]
        return [Compute((ahead,)), Compute((back,))]


def _interleaved(shape: ScheduleShape, rank: int, rule: TransferRule, links: Links) -> _InterleavedRank:
    last_rank = shape.num_ranks - 1
    forward, backward = _passes(shape, rank)
    return _InterleavedRank(
        shape=shape,
        rule=rule,
        links=links,
        forward=forward,
        backward=backward,
        activations=_arrivals(
            shape, links, forward, behind=_passes(shape, last_rank)[0] if rank == 0 else None
        ),
        gradients=_arrivals(
            shape, links, backward, behind=_passes(shape, 0)[1] if rank == last_rank else None
        ),
        num_warm_up=num_warm_up_passes(shape, rank),
    )


def _arrivals(
    shape: ScheduleShape, links: Links, passes: Sequence[Pass], *, behind: Sequence[Pass] | None
) -> list[Tensor | None]:
    """What is received while the output of each of `passes` is sent (recv_tensor_from_previous_stage).

    A rank receives what its next pass reads. The rank that leads (the first one forward, the last one
    backward) runs PP - 1 passes ahead of the rank that it receives from, whose passes are `behind`, and
    receives what that rank has just made.
    """
    if behind is None:
        return [*(links.tensor_read(one) for one in passes[1:]), None]
    ahead = shape.num_ranks - 1
    made = [links.tensor_made(one) for one in behind[: len(passes) - ahead]]
    return [*([None] * ahead), *made]
