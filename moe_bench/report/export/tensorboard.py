"""A record as a TensorBoard event file."""

from __future__ import annotations

from pathlib import Path

from moe_bench.errors import BadInputError
from moe_bench.report.export.points import points
from moe_bench.report.export.tracker import outcome, require_installed, settings
from moe_bench.results.record import Record
from moe_bench.results.store import record_folder


def require_tensorboard() -> None:
    """Raise MissingRequirementError without the package `tensorboard`."""
    require_installed("tensorboard", package="'moe_bench[tensorboard]'", name="TensorBoard")


def write_events(record: Record, folder: Path, *, record_id: str) -> Path:
    """Write `record` into `<folder>/<model>/<recipe>[_<scale>]/<id>/` and return that.

    Raises BadInputError where it has been written before: TensorBoard would draw both.
    """
    require_tensorboard()
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.plugins.text.summary_v2 import text_pb
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    run = record_folder(folder, record.plan) / record_id
    if run.is_dir():
        raise BadInputError(f"{run} is there already; remove it or name another folder")
    writer = EventFileWriter(str(run))
    found = tuple(points(record))
    for point in found:
        value = Summary.Value(tag=point.tag, simple_value=point.value)
        writer.add_event(Event(step=point.step, wall_time=point.time_s, summary=Summary(value=[value])))
    for tag, told in (("settings", settings(record)), ("outcome", outcome(record))):
        rows = "\n".join(f"| {name} | {value} |" for name, value in told.items())
        writer.add_event(Event(wall_time=found[0].time_s, summary=text_pb(tag, f"| | |\n|---|---|\n{rows}")))
    writer.close()
    return run
