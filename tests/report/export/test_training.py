"""What TensorBoard's own reader finds of a training run, also of one that went on."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.report.export.training import TrainingEvents
from moe_bench.results.training_health import HealthLine, LayerHealth
from moe_bench.results.training_log import LogLine


def line(step: int, *, loss: float) -> LogLine:
    return LogLine(step=step, loss=loss, grad_norm=None, learning_rate=1e-3, validation_loss=None)


HEALTH = HealthLine(
    step=2,
    num_steps=2,
    layers=(
        LayerHealth(
            layer="decoder.1",
            top_k=1,
            num_tokens=8,
            tokens_per_expert=(4, 2, 0),
            expert_bias_range=(-1.0, 2.0),
        ),
    ),
)


def test_steps_that_are_taken_again_replace_what_was_said_of_them(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first = TrainingEvents(tmp_path, first_step=1)
    for step in (1, 2, 3):
        first.add_line(line(step, loss=4.0))
    first.add_health(HEALTH)
    first.close()
    reader = accumulator.EventAccumulator(str(tmp_path))
    reader.Reload()
    again = TrainingEvents(tmp_path, first_step=3)
    again.add_line(line(3, loss=2.0))
    again.close()
    reader.Reload()
    assert [(event.step, event.value) for event in reader.Scalars("loss")] == [(1, 4.0), (2, 4.0), (3, 2.0)]
    values = {tag: reader.Scalars(tag)[0].value for tag in reader.Tags()["scalars"] if "experts" in tag}
    assert values == {
        "experts/entropy_fraction/decoder.1": pytest.approx(0.5794, abs=1e-4),
        "experts/busiest_share_fraction/decoder.1": 0.5,
        "experts/dropped_fraction/decoder.1": 0.25,
        "experts/num_dead/decoder.1": 1.0,
        "experts/bias_low/decoder.1": -1.0,
        "experts/bias_high/decoder.1": 2.0,
    }
    assert "grad_norm" not in reader.Tags()["scalars"]
