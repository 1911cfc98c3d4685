"""What a user asks of a profiler: which one, over how many steps, and where its traces go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from moe_bench.spec.base import PositiveInt, Spec, Text

if TYPE_CHECKING:
    from moe_bench.spec.scale import Plan

ProfileTool = Literal["torch", "nsys", "parts"]
"""`parts` is our own: marks of the device's clock where the parts of a step start and end, no more."""


class Profile(Spec):
    """Steps after the timed ones that run once more under a profiler, so that no timed step is disturbed."""

    tool: ProfileTool
    num_steps: PositiveInt
    stem: Text
    """Path and beginning of the name of every file."""
    has_own_file: bool = True
    """False under an nsys that somebody else started and named the file of."""

    def of_repeat(self, repeat: int) -> Profile:
        """The same for one of several runs of one process, whose files have names of their own."""
        return self.model_copy(update={"stem": f"{self.stem}-r{repeat}"}) if repeat else self

    def file(self, rank: int, suffix: str) -> str:
        """Path of one rank's file."""
        return f"{self.stem}-rank{rank}.{suffix}"


NSYS_SUFFIX = "nsys-rep"


def is_profiled(plan: Plan, rank: int) -> bool:
    """Whether this process is traced: the first rank of every pipeline stage, and the one of a slice."""
    parallel = plan.recipe.parallel
    return plan.is_slice or rank % (parallel.num_gpus // parallel.pipeline) == 0
