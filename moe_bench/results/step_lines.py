"""Files of a training run with a line of JSON per step, so that a run that was killed keeps what it said."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.spec.base import PositiveInt, Spec


class StepLine(Spec):
    """What is said of one step, or of those up to it."""

    step: PositiveInt


def append_step(path: Path, line: StepLine) -> None:
    """Add `line` to the file at `path`; MissingRequirementError where the disk refuses."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line.model_dump_json() + "\n")
    except OSError as error:
        raise MissingRequirementError(
            f"{path}: {error.strerror}; checkpoints are whole: make room and go on with --resume"
        ) from error


def read_steps[Line: StepLine](path: Path, kind: type[Line], *, what: str) -> Iterator[Line]:
    """The lines of `path`; BadInputError names one that cannot be read, as no line of `what`.

    What a kill cut off within a line is passed over.
    """
    if not path.is_file():
        return
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            yield kind.model_validate_json(line)
        except ValidationError as error:
            raise BadInputError(f"{path}:{number}: no line of {what}; remove it") from error


def cut_steps[Line: StepLine](path: Path, kind: type[Line], *, num_steps: int, what: str) -> None:
    """Drop what was said after step `num_steps`, from which the run goes on, in one step."""
    kept = [line for line in read_steps(path, kind, what=what) if line.step <= num_steps]
    unfinished = path.with_name(f".{path.name}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(line.model_dump_json() + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
