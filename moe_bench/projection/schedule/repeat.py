"""Where the steady state of a schedule may be cut and repeated instead of simulated, and when that is exact.

A schedule of fixed order is a max-plus linear recurrence, and in its steady state the same one in every
period. If one period moves every instant that later work reads by the same time, then each further period
does, whatever the durations are: leaving periods out and adding their time is then exact, not approximate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from moe_bench.projection.schedule.graph import ScheduleGraph, duration_counts, schedule_graph
from moe_bench.projection.schedule.megatron import TransferRule
from moe_bench.projection.schedule.program import Work
from moe_bench.projection.schedule.shape import ScheduleKind, ScheduleShape

TOLERANCE_FRACTION = 1e-12
"""Of the simulated time: what rounding may make of two equal periods."""
_NUM_EDGE_SLOTS = 6
"""At both ends of the steady state: there, other transfers are posted than in its middle."""
_FEWEST_GROUPS = 5
"""Of the shortest simulation where chunks interleave: with fewer, its steady state is mostly too short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """A place in the steady state of every rank, and what later slots read from before it."""

    num_before: tuple[int, ...]
    """Slots of every rank before the cut."""
    num_slots: int
    """Of one rank in one period."""
    nodes: tuple[tuple[int, int], ...]
    """The slots before the cut that those behind it read, each with the slot one period earlier.

    As many of every rank as the furthest look back goes, from this cut or from one a period earlier.
    """
    counts: tuple[tuple[tuple[int, int], ...], ...]
    """Of every rank: how many slots of one period have which duration."""


def period_micro_batches(shape: ScheduleShape) -> int:
    """Micro batches after which the order of work repeats itself."""
    return shape.group_size if shape.num_virtual > 1 and not shape.kind.has_v_placement else 1


def shorter_shapes(shape: ScheduleShape) -> Iterator[ScheduleShape]:
    """The same schedule with fewer micro batches, ever longer, as long as it saves a third of the work."""
    period = period_micro_batches(shape)
    whole = _FEWEST_GROUPS * period if period > 1 else 8 + 3 * shape.num_ranks
    last_group = shape.num_micro_batches % period
    while 3 * (whole + last_group) <= 2 * shape.num_micro_batches:
        yield replace(shape, num_micro_batches=whole + last_group)
        whole *= 2


def repeated_time_s(cut: Cut, ends_s: Sequence[float]) -> float | None:
    """The time of one period, if the last one before the cut moved everything by the same time."""
    first, earlier = cut.nodes[0]
    period_s = ends_s[first] - ends_s[earlier]
    tolerance_s = TOLERANCE_FRACTION * ends_s[-1]
    for node, earlier in cut.nodes:
        if abs(ends_s[node] - ends_s[earlier] - period_s) > tolerance_s:
            return None
    return period_s


@lru_cache(maxsize=128)
def steady_cut(shape: ScheduleShape, rule: TransferRule) -> Cut | None:
    """The last place where `shape` may be cut; None if its steady state is too short to look back in."""
    graph = schedule_graph(shape, rule)
    period = period_micro_batches(shape)
    num_slots = period * _slots_per_micro_batch(shape)
    runs = [_steady_run([slot.work for slot in slots], num_slots, period) for slots in graph.slots]
    num_before = tuple(end - num_slots - _NUM_EDGE_SLOTS for _, end in runs)
    depth = max(_depth(graph, num_before), _depth(graph, [before - num_slots for before in num_before]))
    for (start, _), before in zip(runs, num_before, strict=True):
        if before - depth < start + _NUM_EDGE_SLOTS:
            return None
    return Cut(
        num_before=num_before,
        num_slots=num_slots,
        nodes=tuple(
            (slots[place].last, slots[place - num_slots].last)
            for slots, before in zip(graph.slots, num_before, strict=True)
            for place in range(before - depth, before)
        ),
        counts=tuple(
            duration_counts(slots[before - num_slots : before], graph.duration)
            for slots, before in zip(graph.slots, num_before, strict=True)
        ),
    )


def moved(work: Work, num_micro_batches: int) -> Work:
    """`work` for micro batches that come so much later."""
    return tuple(one._replace(micro_batch=one.micro_batch + num_micro_batches) for one in work)


def _slots_per_micro_batch(shape: ScheduleShape) -> int:
    match shape.kind:
        case ScheduleKind.INTERLEAVED_EP_OVERLAP:
            return shape.num_virtual
        case ScheduleKind.ZERO_BUBBLE_H1 | ScheduleKind.ZERO_BUBBLE_V:
            return 3 * shape.num_virtual
        case ScheduleKind.DUAL_PIPE_V:
            return 2
        case _:
            return 2 * shape.num_virtual


def _steady_run(order: Sequence[Work], num_slots: int, num_micro_batches: int) -> tuple[int, int]:
    """The longest stretch in which every slot is that of one period earlier, for later micro batches."""
    best, start = (0, 0), num_slots
    for place in range(num_slots, len(order) + 1):
        if place == len(order) or order[place] != moved(order[place - num_slots], num_micro_batches):
            best = max(best, (start, place), key=lambda run: run[1] - run[0])
            start = place + 1
    return best


def _depth(graph: ScheduleGraph, num_before: Sequence[int]) -> int:
    """How many slots before the cut the slots behind it look back, at most, on any rank."""
    ages = {
        slot.first: before - place
        for slots, before in zip(graph.slots, num_before, strict=True)
        for place, slot in enumerate(slots)
    }
    deepest = 0
    read_ages = [0] * (len(graph.before) + 1)
    """The largest age among the slots that a node without work stands for; slots stand for themselves."""
    for node, pair in enumerate(zip(graph.before, graph.other, strict=True), start=1):
        oldest = max(read_ages[one] for one in pair)
        age = ages.get(node)
        if age is None:
            read_ages[node] = oldest
        else:
            read_ages[node] = age
            if age <= 0:
                deepest = max(deepest, oldest)
    return deepest
