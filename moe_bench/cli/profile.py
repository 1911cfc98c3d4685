"""The options of a profiler, and what they ask of a run."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.errors import BadInputError
from moe_bench.spec.profile import Profile, ProfileTool, is_profiled

if TYPE_CHECKING:
    from moe_bench.spec.rendezvous import Rendezvous
    from moe_bench.spec.scale import Plan


ProfileOption = Annotated[
    ProfileTool | None,
    typer.Option(
        "--profile",
        help="Profile more steps after the timed ones: torch.profiler, nsys, or part by part.",
    ),
]
ProfileStepsOption = Annotated[
    int | None, typer.Option("--profile-steps", min=1, help="Number of profiled steps; default: 1.")
]
TracedOption = Annotated[str | None, typer.Option("--traced", hidden=True)]
"""Set in a process that nsys started (moe_bench/launch/nsys.py)."""


def profile_arguments(tool: ProfileTool | None, num_steps: int | None) -> tuple[str, ...]:
    """The options again, for a command that starts the same run.

    Raises BadInputError for a number of steps without a profiler.
    """
    _require_tool(tool, num_steps)
    return () if tool is None else ("--profile", tool, "--profile-steps", str(num_steps or 1))


def profile_of(
    tool: ProfileTool | None,
    num_steps: int | None,
    *,
    plan: Plan,
    place: Rendezvous | None,
    folder: Path,
    traced: str | None,
) -> Profile | None:
    """What was asked for, with files in `folder`; a rank that nsys is to trace is replaced by it and itself.

    Raises BadInputError for nsys without a GPU or a number of steps without a profiler,
    MissingRequirementError where nsys is not installed.
    """
    _require_tool(tool, num_steps)
    if tool is None:
        return None
    from moe_bench.launch.environment import current_environment
    from moe_bench.launch.nsys import require_nsys, runs_under_nsys, start_under_nsys

    stem = folder / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-pid{os.getpid()}"
    is_theirs = traced is None and runs_under_nsys(current_environment())
    profile = Profile(
        tool=tool, num_steps=num_steps or 1, stem=traced or str(stem), has_own_file=not is_theirs
    )
    if tool == "nsys" and not is_theirs:
        require_nsys(plan)
        if place is not None and traced is None and is_profiled(plan, place.rank):
            folder.mkdir(parents=True, exist_ok=True)
            rank = plan.rank if plan.is_slice else place.rank
            start_under_nsys(profile, rank, run_args=tuple(sys.argv[2:]))
    return profile


def _require_tool(tool: ProfileTool | None, num_steps: int | None) -> None:
    if tool is None and num_steps is not None:
        raise BadInputError(f"--profile-steps {num_steps}: nothing is profiled; add --profile TOOL")
