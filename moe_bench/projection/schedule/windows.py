"""How long a pipeline rank goes on when gradients are complete, and how long before weights are needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_bench.projection.schedule.graph import Node
from moe_bench.projection.schedule.shape import PassKind
from moe_bench.projection.schedule.timeline import ChunkInstants, Timeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """Time of one rank in which the data-parallel traffic of one chunk may hide."""

    chunk: int
    busy_s: float
    """Of it, the rank computes: traffic runs beside compute and competes with it."""
    idle_s: float
    """Of it, the rank waits for the pipeline: traffic is free."""

    @property
    def total_s(self) -> float:
        """The whole window."""
        return self.busy_s + self.idle_s


def reduce_windows(timeline: Timeline, *, aligned: bool) -> tuple[tuple[Window, ...], ...]:
    """Of every rank, for each of its chunks: from the start of its reduction to the step's last pass.

    A reduction starts when the chunk's weight gradients are complete. `aligned` is `align_grad_reduce`, the
    default of Megatron-LM: rank r starts r backward passes later, or when it has none left, so that all ranks
    reduce at once (backward_step_helper_postprocess and the end of the flush in schedules.py). Without it,
    buckets start within the chunk's last backward slot, which lasts from `last_backward_s` to `gradients_s`
    (ChunkInstants); that slot is not in the window.
    """
    return _by_rank(timeline, [_reduce_window(timeline, one, aligned=aligned) for one in timeline.chunks])


def gather_windows(timeline: Timeline) -> tuple[tuple[Window, ...], ...]:
    """Of every rank, for each of its chunks: from the start of the step to the chunk's first forward pass."""
    windows = []
    for one in timeline.chunks:
        slots = timeline.graph.slots[one.rank]
        busy_s = _busy_s(timeline, slots[: timeline.graph.first_forward[one.chunk]])
        windows.append(Window(chunk=one.chunk, busy_s=busy_s, idle_s=one.first_forward_s - busy_s))
    return _by_rank(timeline, windows)


def _reduce_window(timeline: Timeline, one: ChunkInstants, *, aligned: bool) -> Window:
    """All of it stands behind the repeated periods, so that the simulated instants need no shift."""
    slots = timeline.graph.slots[one.rank]
    place = timeline.graph.last_gradient[one.chunk]
    later, start_s = slots[place + 1 :], timeline.ends_s[slots[place].last]
    if aligned:
        backward = [
            place
            for place, slot in enumerate(later)
            if any(each.kind in (PassKind.BACKWARD, PassKind.DGRAD) for each in slot.work)
        ]
        num_skipped = (
            backward[one.rank - 1] + 1 if 0 < one.rank <= len(backward) else len(later) * (one.rank > 0)
        )
        if num_skipped:
            start_s = timeline.ends_s[later[num_skipped - 1].last]
        later = later[num_skipped:]
    busy_s = _busy_s(timeline, later)
    whole_s = max(timeline.ends_s) - start_s
    return Window(chunk=one.chunk, busy_s=busy_s, idle_s=whole_s - busy_s)


def _busy_s(timeline: Timeline, slots: Sequence[Node]) -> float:
    return sum(timeline.ends_s[slot.last] - timeline.starts_s[slot.first] for slot in slots)


def _by_rank(timeline: Timeline, windows: Sequence[Window]) -> tuple[tuple[Window, ...], ...]:
    """`windows` stand in the order of chunks."""
    return tuple(
        tuple(windows[chunk] for chunk in timeline.shape.chunks_of(rank))
        for rank in range(timeline.shape.num_ranks)
    )
