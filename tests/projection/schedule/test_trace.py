"""The trace is what Perfetto and chrome://tracing ask for."""

import json
from pathlib import Path

import pytest

from moe_bench.projection.schedule.simulation import ScheduleKind, Timeline
from moe_bench.projection.schedule.trace import trace_events, write_trace
from tests.projection.schedule.test_simulation import equal_chunks

TIMELINE = equal_chunks(ScheduleKind.INTERLEAVED, 4, 2, 8)
REQUIRED = {"X": {"name", "cat", "ph", "ts", "dur", "pid", "tid"}, "M": {"name", "ph", "pid", "tid", "args"}}
"""Of each phase that we write, by the Trace Event Format."""


def test_every_event_has_the_fields_of_its_phase() -> None:
    for event in trace_events(TIMELINE, name="recipe")["traceEvents"]:
        assert set(event) >= REQUIRED[event["ph"]]


def test_there_is_one_named_track_per_rank_and_one_event_per_pass() -> None:
    events = trace_events(TIMELINE, name="recipe")["traceEvents"]
    names = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert names == {rank: f"pipeline rank {rank}" for rank in range(4)}
    passes = [event["name"] for event in events if event["ph"] == "X"]
    assert sorted(passes) == sorted(
        f"{kind}{chunk}.{batch}" for kind in "FB" for chunk in range(8) for batch in range(8)
    )


def test_times_are_microseconds() -> None:
    events = [event for event in trace_events(TIMELINE, name="recipe")["traceEvents"] if event["ph"] == "X"]
    assert max(event["ts"] + event["dur"] for event in events) == pytest.approx(TIMELINE.total_s * 1e6)
    assert {round(event["dur"]) for event in events} == {1_000_000, 2_000_000}


@pytest.mark.parametrize("num_micro_batches", [8, 200])
def test_a_written_trace_is_json_with_every_micro_batch(tmp_path: Path, num_micro_batches: int) -> None:
    timeline: Timeline = equal_chunks(ScheduleKind.DUAL_PIPE_V, 4, 2, num_micro_batches)
    write_trace(timeline, tmp_path / "trace.json", name="recipe")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    seen = {
        (one["pass"], one["chunk"], one["micro batch"])
        for event in events
        if event["ph"] == "X"
        for one in event["args"]["passes"]
        if one["pass"] in "FW" or one["pass"] == "B"
    }
    assert len(seen) == 2 * 8 * num_micro_batches  # a forward pass and a complete backward pass of each
