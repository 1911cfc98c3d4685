"""Every failure a user can cause, each with the exit code that the command line returns for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

MAX_MISTAKES_SHOWN = 10


class MoeBenchError(Exception):
    """A failure with a name; the command line prints it on one line and exits with `exit_code`."""

    exit_code: ClassVar[int] = 2


class MeasurementError(MoeBenchError):
    """The run gave no valid number: a rank died, the loss was not finite, tokens were dropped unplanned."""

    exit_code = 1


class BadInputError(MoeBenchError):
    """Something the user wrote cannot be used as written."""

    exit_code = 2


class MissingRequirementError(MoeBenchError):
    """Something that the recipe asks for is not on this machine: a package, a version, a GPU, a kernel."""

    exit_code = 3


class SchedulerError(MoeBenchError):
    """The scheduler refused the job."""

    exit_code = 4


class GateError(MoeBenchError):
    """A comparison with a baseline failed."""

    exit_code = 5


EXIT_CODES: tuple[tuple[int, str], ...] = (
    (0, "done"),
    (1, "the run gave no valid number"),
    (2, "bad input"),
    (3, "something needed is not here"),
    (4, "the scheduler refused"),
    (5, "a gate failed"),
)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Mistake:
    """One thing wrong in a user's file: where it stands, what is wrong, and what to write instead."""

    file: str
    """Or the option that says it, as typed, which has no lines."""
    line: int
    key: str
    problem: str
    fix: str

    def __str__(self) -> str:
        place = self.file if self.file.startswith("--") else f"{self.file}:{self.line}"
        return f"{place}: {self.key}: {self.problem}; {self.fix}"


class RecipeError(BadInputError):
    """A YAML file of ours cannot be used as written; one line per mistake, in file order, at most ten."""

    def __init__(self, mistakes: tuple[Mistake, ...]) -> None:
        self.mistakes = tuple(sorted(mistakes))
        lines = [str(mistake) for mistake in self.mistakes[:MAX_MISTAKES_SHOWN]]
        num_hidden = len(self.mistakes) - MAX_MISTAKES_SHOWN
        if num_hidden > 0:
            lines.append(f"and {num_hidden} more")
        super().__init__("\n".join(lines))
