"""What one pipeline rank does, in order: it computes passes, posts transfers and waits for transfers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from moe_bench.projection.schedule.shape import Pass, PassKind, ScheduleShape

Work = tuple[Pass, ...]
"""What one slot computes: one pass, or a forward and a backward pass merged."""


class Tensor(NamedTuple):
    """What travels: the activation behind a chunk, or the gradient in front of it."""

    is_activation: bool
    chunk: int
    """The chunk that made it."""
    micro_batch: int


class Compute(NamedTuple):
    """Compute `work` once the tensors that it reads have come."""

    work: Work


class Post(NamedTuple):
    """Start to send and to receive; a transfer moves once both of its ends are posted."""

    sends: tuple[Tensor, ...]
    receives: tuple[Tensor, ...]
    is_early: bool = False
    """Within the last merged slot, before what it computes behind its sends."""


class Wait(NamedTuple):
    """Go on when these transfers are complete."""

    tensors: tuple[Tensor, ...]
    is_beside: bool = False
    """The stream of dispatch and combine waits, compute goes on."""


Instruction = Compute | Post | Wait


@dataclass(frozen=True, slots=True)
class Links:
    """Which passes of a schedule read from another rank, and which make what another rank reads."""

    read: Mapping[tuple[PassKind, int], tuple[bool, int]]
    """By kind and chunk of a pass: whether it reads an activation, and of which chunk."""
    made: Mapping[tuple[PassKind, int], tuple[bool, int]]
    """By kind and chunk of a pass: whether what it makes is an activation, and the chunk itself."""

    def tensor_read(self, one: Pass) -> Tensor | None:
        """What `one` reads from another rank, if anything."""
        found = self.read.get((one.kind, one.chunk))
        return None if found is None else Tensor(*found, one.micro_batch)

    def tensor_made(self, one: Pass) -> Tensor | None:
        """What another rank reads of `one`, if anything."""
        found = self.made.get((one.kind, one.chunk))
        return None if found is None else Tensor(*found, one.micro_batch)


def links_of(shape: ScheduleShape) -> Links:
    """Between neighbouring chunks on different ranks: activations forward, gradients of inputs backward."""
    read, made = {}, {}
    for chunk in range(shape.num_chunks - 1):
        if shape.rank_of(chunk) != shape.rank_of(chunk + 1):
            made[PassKind.FORWARD, chunk] = read[PassKind.FORWARD, chunk + 1] = (True, chunk)
            for kind in (PassKind.BACKWARD, PassKind.DGRAD):
                made[kind, chunk + 1] = read[kind, chunk] = (False, chunk + 1)
    return Links(read, made)


def exchange(sends: Iterable[Tensor | None], receives: Iterable[Tensor | None]) -> list[Instruction]:
    """Post, and wait for all of it: Megatron-Core's P2PCommunicator without `overlap_p2p_comm`."""
    sent, received = existing(sends), existing(receives)
    return [Post(sent, received), Wait(sent + received)] if sent + received else []


def eager_program(links: Links, order: Sequence[Work]) -> tuple[Instruction, ...]:
    """Transfers beside compute: every receive is posted from the start, a send as soon as there is one."""
    program: list[Instruction] = [
        Post((), existing(links.tensor_read(one) for work in order for one in work))
    ]
    for work in order:
        program.append(Compute(work))
        sends = existing(links.tensor_made(one) for one in work)
        if sends:
            program.append(Post(sends, ()))
    return tuple(program)


def existing(tensors: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Those that are not None."""
    return tuple([tensor for tensor in tensors if tensor is not None])
