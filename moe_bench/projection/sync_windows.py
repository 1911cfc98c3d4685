"""How much of a step's data-parallel traffic the simulated pipeline hides, chunk by chunk."""

from __future__ import annotations

from collections.abc import Sequence

from moe_bench.projection.schedule.timeline import Timeline
from moe_bench.projection.schedule.windows import gather_windows, reduce_windows


def exposed_s(windows_s: Sequence[float], traffic_s: float) -> float:
    """What is left where chunk i's share, traffic / n, may hide in `windows_s[i]` and shares go one by one.

    Shortest window first: k shares must pass within the k-th window, max_k (k traffic / n - window_k), not
    below 0. Holds for gradients, whose last shares the end of the step waits for, and mirrored in time for
    weights, whose first shares the first passes wait for.
    """
    share_s = traffic_s / len(windows_s)
    return max(0.0, *(rank * share_s - window for rank, window in enumerate(sorted(windows_s), 1)))


def reduction_windows_s(timeline: Timeline, rank: int, *, num_buckets: int) -> tuple[float, ...]:
    """Of each chunk of `rank`: from its first full bucket to the end of the step.

    Buckets fill during the chunk's last backward slot; but for the last one they leave within it.
    """
    windows = reduce_windows(timeline, aligned=False)[rank]
    within = _all_but_one(num_buckets, len(windows))
    chunks = [timeline.chunks[window.chunk] for window in windows]
    return tuple(
        window.total_s + within * (chunk.gradients_s - chunk.last_backward_s)
        for window, chunk in zip(windows, chunks, strict=True)
    )


def gathering_windows_s(timeline: Timeline, rank: int, *, num_buckets: int) -> tuple[float, ...]:
    """Of each chunk of `rank`: from the start of the step to where its last bucket must be there.

    Its first bucket is needed when its first forward pass starts, the others as the pass goes on.
    """
    windows = gather_windows(timeline)[rank]
    first_slot_s = next(slot.end_s - slot.start_s for slot in timeline.slots(rank))
    return tuple(
        window.total_s + first_slot_s * _all_but_one(num_buckets, len(windows)) for window in windows
    )


def _all_but_one(num_buckets: int, num_chunks: int) -> float:
    """Share of a chunk's buckets that are not its last one."""
    per_chunk = max(1.0, num_buckets / num_chunks)
    return 1 - 1 / per_chunk
