"""Simulates one step of a pipeline schedule, pass by pass and rank by rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_bench.projection.schedule.graph import Part, ScheduleGraph, evaluate, schedule_graph
from moe_bench.projection.schedule.megatron import TransferRule
from moe_bench.projection.schedule.program import Work
from moe_bench.projection.schedule.repeat import (
    period_micro_batches,
    repeated_time_s,
    shorter_shapes,
    steady_cut,
)
from moe_bench.projection.schedule.shape import PassKind, ScheduleError, ScheduleKind, ScheduleShape
from moe_bench.projection.schedule.timeline import ChunkInstants, Repeat, Timeline

__all__ = [
    "ChunkTime",
    "ScheduleError",
    "ScheduleKind",
    "ScheduleShape",
    "Timeline",
    "TransferRule",
    "simulate_shape",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTime:
    """How long one micro batch takes in one chunk, transfers between ranks left out."""

    forward_s: float
    dgrad_s: float
    """Gradient of the input, recomputation included."""
    wgrad_s: float
    """Gradient of the weights."""
    joint_s: float | None = None
    """One forward and one backward pass of this chunk merged into one slot."""
    joint_tail_s: float = 0.0
    """Of a merged slot with this chunk's backward pass, what is computed when both outputs are already sent:
    with `overlap_p2p_comm`, the weight gradient of the attention of its first layer."""

    @property
    def backward_s(self) -> float:
        """Both gradients, one behind the other."""
        return self.dgrad_s + self.wgrad_s


def simulate_shape(
    shape: ScheduleShape, rule: TransferRule, *, chunks: Sequence[ChunkTime], transfer_s: float
) -> Timeline:
    """One step: every pass starts when its rank is free and its input has come.

    `chunks` are in model order; chunk i stands on rank i modulo PP, or on the V of
    `ScheduleKind.has_v_placement`. `transfer_s` is the time of one activation or gradient between two ranks.
    Merged passes take `merged_s`. Long schedules are cut where their steady state is shown to repeat itself
    (projection/schedule/repeat.py); the result is that of the whole simulation but for rounding.
    """
    if len(chunks) != shape.num_chunks:
        raise ScheduleError(f"{len(chunks)} chunk times for {shape.num_chunks} chunks; give one of each")
    if rule.overlaps not in shape.kind.overlap_choices:
        raise ScheduleError(
            f"{shape.kind} with overlaps_transfer = {rule.overlaps}; it knows the other alone"
        )
    for shorter in shorter_shapes(shape):
        cut = steady_cut(shorter, rule)
        if cut is None:
            continue
        graph = schedule_graph(shorter, rule)
        durations_s = _durations_s(graph, chunks, transfer_s)
        starts_s, ends_s = evaluate(graph, durations_s)
        period_s = repeated_time_s(cut, ends_s)
        if period_s is not None:
            num_left_out = shape.num_micro_batches - shorter.num_micro_batches
            repeat = Repeat(
                cut=cut, num_periods=num_left_out // period_micro_batches(shape), period_s=period_s
            )
            return _timeline(shape, graph, durations_s, (starts_s, ends_s), repeat)
    graph = schedule_graph(shape, rule)
    durations_s = _durations_s(graph, chunks, transfer_s)
    return _timeline(shape, graph, durations_s, evaluate(graph, durations_s), None)


def merged_s(chunks: Sequence[ChunkTime], work: Work) -> float:
    """The time of a forward pass of chunk i merged with a backward pass of chunk j.

    t = F_i J_i / (F_i + B_i) + B_j J_j / (F_j + B_j), J being `joint_s`: each pass is shortened as it is
    beside its own counterpart. For i = j it is J_i; for chunks with unequal layers it is an approximation.
    """
    total_s = 0.0
    for one in work:
        time = chunks[one.chunk]
        if time.joint_s is None:
            raise ScheduleError(f"the schedule merges passes; state joint_s of chunk {one.chunk}")
        alone_s = pass_s(time, one.kind)
        if alone_s > 0:
            total_s += time.joint_s * alone_s / (time.forward_s + time.backward_s)
    return total_s


def pass_s(time: ChunkTime, kind: PassKind) -> float:
    """The time of one pass on its own."""
    match kind:
        case PassKind.FORWARD:
            return time.forward_s
        case PassKind.BACKWARD:
            return time.backward_s
        case PassKind.DGRAD:
            return time.dgrad_s
        case PassKind.WGRAD:
            return time.wgrad_s


def _durations_s(graph: ScheduleGraph, chunks: Sequence[ChunkTime], transfer_s: float) -> list[float]:
    """By the place that the nodes name."""
    return [0.0, transfer_s, *(_part_s(part, chunks) for part in graph.parts)]


def _part_s(part: Part, chunks: Sequence[ChunkTime]) -> float:
    work = part.work
    if len(work) == 1:
        return pass_s(chunks[work[0].chunk], work[0].kind)
    whole_s = merged_s(chunks, work)
    tail_s = min(whole_s, chunks[work[1].chunk].joint_tail_s)
    return tail_s if part.is_behind_sends else whole_s - tail_s


def _timeline(
    shape: ScheduleShape,
    graph: ScheduleGraph,
    durations_s: Sequence[float],
    instants_s: tuple[Sequence[float], Sequence[float]],
    repeat: Repeat | None,
) -> Timeline:
    starts_s, ends_s = instants_s
    left_out_s = 0.0 if repeat is None else repeat.left_out_s
    busy_s = []
    for rank, counts in enumerate(graph.counts):
        rank_s = sum(number * durations_s[index] for index, number in counts)
        if repeat is not None:
            period = repeat.cut.counts[rank]
            rank_s += repeat.num_periods * sum(number * durations_s[index] for index, number in period)
        busy_s.append(rank_s)
    return Timeline(
        shape=shape,
        total_s=max(ends_s) + left_out_s,
        busy_s=tuple(busy_s),
        chunks=tuple(
            ChunkInstants(
                chunk=chunk,
                rank=shape.rank_of(chunk),
                first_forward_s=starts_s[first.first],
                last_backward_s=starts_s[last.first] + left_out_s,
                gradients_s=ends_s[last.last] + left_out_s,
            )
            for chunk, (first, last) in enumerate(graph.chunk_ends())
        ),
        max_in_flight=graph.max_in_flight,
        graph=graph,
        starts_s=starts_s,
        ends_s=ends_s,
        repeat=repeat,
    )
