"""A rank under Nsight Systems: the command that starts it again, tracing only what the rank marks."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.launch.local import MODULE
from moe_bench.spec.profile import NSYS_SUFFIX, Profile
from moe_bench.spec.scale import Plan

TRACED_OPTION = "--traced"
"""Hidden option of `run`: this process was started by nsys, and this is the stem of its files."""
_SESSION = "NSYS_PROFILING_SESSION_ID"
"""Set by nsys in what it starts."""
Execute = Callable[[str, tuple[str, ...]], object]
Which = Callable[[str], str | None]


def runs_under_nsys(env: Mapping[str, str]) -> bool:
    """Whether somebody started this process under nsys, which then writes a file of their naming."""
    return _SESSION in env


def require_nsys(plan: Plan, *, which: Which = shutil.which) -> None:
    """Raise BadInputError for a run without CUDA, MissingRequirementError without nsys."""
    if plan.recipe.system.gpu is None:
        raise BadInputError("--profile nsys: it starts at a CUDA call, and this run has no GPU; use torch")
    if which("nsys") is None:
        raise MissingRequirementError(
            "--profile nsys: not on PATH; install Nsight Systems, take an image that has it, or use torch"
        )


def start_under_nsys(
    profile: Profile, rank: int, *, run_args: Sequence[str], execute: Execute = os.execvp
) -> None:
    """Replace this process, one rank, by nsys with the same rank under it; `run_args` followed `run`."""
    command = nsys_command(profile, rank, run_args=run_args, python=sys.executable)
    execute(command[0], command)


def nsys_command(profile: Profile, rank: int, *, run_args: Sequence[str], python: str) -> tuple[str, ...]:
    """nsys, which records between cudaProfilerStart and cudaProfilerStop, and the rank.

    `--capture-range-end=stop` lets the rank go on afterwards, to write the record.
    """
    return (
        *("nsys", "profile", "--trace=cuda,nvtx", "--sample=none", "--cpuctxsw=none"),
        *("--capture-range=cudaProfilerApi", "--capture-range-end=stop"),
        f"--output={profile.file(rank, NSYS_SUFFIX)}",
        *(python, "-m", MODULE, "run", *run_args, TRACED_OPTION, profile.stem),
    )
