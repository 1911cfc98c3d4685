"""What a training run says of each step: losses, gradients and the learning rate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from moe_bench.results.step_lines import StepLine, append_step, cut_steps, read_steps
from moe_bench.spec.base import NonNegativeFloat

LOG = "log.jsonl"
_WHAT = "a training log"


class LogLine(StepLine):
    """One step."""

    loss: NonNegativeFloat
    """Mean cross entropy per token over the global batch, in nats."""
    grad_norm: NonNegativeFloat | None
    """Over the whole model, before clipping; None where nothing is clipped."""
    learning_rate: NonNegativeFloat
    """Of all weights but experts with a rate of their own."""
    validation_loss: NonNegativeFloat | None
    """In nats per token; None where it was not taken."""


def append_line(folder: Path, line: LogLine) -> None:
    """Add `line` to the log of the run in `folder`."""
    append_step(folder / LOG, line)


def read_log(folder: Path) -> Iterator[LogLine]:
    """The lines of the run in `folder`; BadInputError names one that cannot be read."""
    yield from read_steps(folder / LOG, LogLine, what=_WHAT)


def cut_log(folder: Path, *, num_steps: int) -> None:
    """Drop what was said after step `num_steps`, from which the run goes on."""
    cut_steps(folder / LOG, LogLine, num_steps=num_steps, what=_WHAT)
