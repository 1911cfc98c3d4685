"""A training run as TensorBoard event files, written as it goes: losses, learning rate, experts by layer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_bench.report.export.tensorboard import require_tensorboard
from moe_bench.results.training_health import HealthLine
from moe_bench.results.training_log import LogLine


class TrainingEvents:
    """The event files of one run, in a folder of its own.

    A run that goes on writes another file there: TensorBoard then drops what older ones say of steps that
    are taken again.
    """

    def __init__(self, folder: Path, *, first_step: int) -> None:
        """Raises MissingRequirementError without the package `tensorboard`. Starts a thread."""
        require_tensorboard()
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer = EventFileWriter(str(folder))
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(step=first_step, session_log=start))

    def add_line(self, line: LogLine) -> None:
        """Losses in nats per token, gradient norm and learning rate of one step."""
        values = {
            "loss": line.loss,
            "validation_loss": line.validation_loss,
            "grad_norm": line.grad_norm,
            "learning_rate": line.learning_rate,
        }
        self._add(line.step, {tag: value for tag, value in values.items() if value is not None})

    def add_health(self, line: HealthLine) -> None:
        """One curve for each layer and figure, `experts/<figure>/<layer>`."""
        self._add(line.step, dict(health_points(line)))

    def close(self) -> None:
        """Write what is still in memory."""
        self._writer.close()

    def _add(self, step: int, values: dict[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        found = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
        # the writer stamps events with the time at which they come
        self._writer.add_event(Event(step=step, summary=Summary(value=found)))


def health_points(line: HealthLine) -> Iterator[tuple[str, float]]:
    """Tag and value of every curve of the experts; what a layer does not have is left out."""
    for layer in line.layers:
        low, high = layer.expert_bias_range or (None, None)
        figures = {
            "entropy_fraction": layer.entropy_fraction,
            "busiest_share_fraction": layer.busiest_share_fraction,
            "dropped_fraction": layer.dropped_fraction,
            "num_dead": len(layer.dead_experts),
            "bias_low": low,
            "bias_high": high,
        }
        for name, value in figures.items():
            if value is not None:
                yield f"experts/{name}/{layer.layer}", value
