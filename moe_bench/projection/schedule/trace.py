"""A simulated pipeline as a trace that Perfetto and chrome://tracing open: one track per pipeline rank."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moe_bench.projection.schedule.shape import PassKind
from moe_bench.projection.schedule.timeline import Slot, Timeline

_US_PER_S = 1e6
"""The format counts microseconds."""
_CATEGORIES = {
    PassKind.FORWARD: "forward",
    PassKind.BACKWARD: "backward",
    PassKind.DGRAD: "input gradient",
    PassKind.WGRAD: "weight gradient",
}
MERGED = "forward and backward"


def trace_events(timeline: Timeline, *, name: str) -> dict[str, Any]:
    """The trace as a JSON object in the Trace Event Format: complete events (`X`) and names (`M`).

    The format: docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
    """
    events = [_named("process_name", 0, name)]
    for rank in range(timeline.shape.num_ranks):
        events.append(_named("thread_name", rank, f"pipeline rank {rank}"))
        events.append(_metadata("thread_sort_index", rank, {"sort_index": rank}))
        events += [_complete(slot) for slot in timeline.slots(rank)]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def write_trace(timeline: Timeline, path: Path, *, name: str) -> None:
    """Write the trace of `timeline`; ui.perfetto.dev opens it."""
    path.write_text(json.dumps(trace_events(timeline, name=name)) + "\n", encoding="utf-8")


def category(slot: Slot) -> str:
    """What a slot computes, in a word."""
    return MERGED if len(slot.work) > 1 else _CATEGORIES[slot.work[0].kind]


def _complete(slot: Slot) -> dict[str, Any]:
    return {
        "name": slot.name,
        "cat": category(slot),
        "ph": "X",
        "ts": slot.start_s * _US_PER_S,
        "dur": (slot.end_s - slot.start_s) * _US_PER_S,
        "pid": 0,
        "tid": slot.rank,
        "args": {
            "passes": [
                {"pass": str(one.kind), "chunk": one.chunk, "micro batch": one.micro_batch}
                for one in slot.work
            ]
        },
    }


def _named(what: str, rank: int, name: str) -> dict[str, Any]:
    return _metadata(what, rank, {"name": name})


def _metadata(what: str, rank: int, arguments: dict[str, Any]) -> dict[str, Any]:
    return {"name": what, "ph": "M", "pid": 0, "tid": rank, "args": arguments}
