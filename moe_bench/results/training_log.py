"""What a training run says of each step: a line of JSON, so that a run that was killed keeps what it said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from moe_bench.errors import BadInputError
from moe_bench.spec.base import NonNegativeFloat, PositiveInt, Spec

LOG = "log.jsonl"


class LogLine(Spec):
    """One step."""

    step: PositiveInt
    loss: NonNegativeFloat
    """Mean cross entropy per token over the global batch, in nats."""
    grad_norm: NonNegativeFloat | None
    """Over the whole model, before clipping; None where nothing is clipped."""
    learning_rate: NonNegativeFloat
    """Of all weights but experts with a rate of their own."""
    validation_loss: NonNegativeFloat | None
    """In nats per token; None where it was not taken."""


def append_line(folder: Path, line: LogLine) -> None:
    """Write it behind the others."""
    with (folder / LOG).open("a", encoding="utf-8") as file:
        file.write(line.model_dump_json() + "\n")


def read_log(folder: Path) -> Iterator[LogLine]:
    """The lines of the run in `folder`; BadInputError names one that cannot be read.

    What a kill cut off within a line is passed over.
    """
    path = folder / LOG
    if not path.is_file():
        return
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            yield LogLine.model_validate_json(line)
        except ValidationError as error:
            raise BadInputError(f"{path}:{number}: no line of a training log; remove it") from error


def cut_log(folder: Path, *, num_steps: int) -> None:
    """Drop what was said after step `num_steps`, from which the run goes on."""
    kept = [line for line in read_log(folder) if line.step <= num_steps]
    path = folder / LOG
    unfinished = path.with_name(f".{LOG}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(line.model_dump_json() + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
