"""Starts the ranks of a recipe on the GPUs of this machine."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence

from moe_bench.errors import MissingRequirementError
from moe_bench.launch.local import local_command
from moe_bench.launch.runner import Runner
from moe_bench.spec.scale import Plan

Execute = Callable[[str, tuple[str, ...]], object]


def require_gpus_here(plan: Plan, *, run: Runner) -> None:
    """Raise MissingRequirementError where this machine has fewer GPUs than `plan` needs."""
    asked, num_needed, num_here = plan.asked, plan.num_ranks, num_gpus_here(run)
    if plan.is_slice and num_here == 0:
        raise MissingRequirementError(
            f"a slice of {asked} needs 1 GPU and this machine has 0; "
            "run it at toy size on the CPU with --scale tiny_slice"
        )
    if num_here < num_needed:
        smaller = f"--scale node --num-gpus {num_here}" if num_here else "--scale smoke"
        raise MissingRequirementError(
            f"{asked} needs {num_needed} GPU{'s' if num_needed > 1 else ''} and this machine has {num_here}; "
            f"run a smaller one with {smaller}, or this one with `sbatch slurm/run_recipe.sh {_words(plan)}`"
        )


def _words(plan: Plan) -> str:
    """What asks for `plan` again: the recipe, its size where that was asked for, and the user's changes."""
    origin = plan.recipe.origin
    words = [plan.asked, *(["--scale", "node"] if plan.scale == "node" else [])]
    if origin is not None:
        words[0] = origin.recipe
    if origin is not None or plan.scale == "node":
        words += ["--num-gpus", str(plan.num_ranks)]
    if origin is not None and origin.scaling == "strong":
        words += ["--strong"]
    for change in plan.modified if origin is None else origin.changes:
        words += ["--set", change]
    return shlex.join(words)


def start_ranks_here(plan: Plan, *, run_args: tuple[str, ...], execute: Execute = os.execvp) -> None:
    """Replace this process by torchrun with one rank per GPU; `run_args` is what followed `moe-bench run`."""
    command = local_command(plan, run_args=run_args, python=sys.executable)
    execute(command[0], command)


def repeat_ranks_here(
    plan: Plan, *, run_args: tuple[str, ...], num_repeats: int, run_live: Callable[[Sequence[str]], int]
) -> int:
    """Start all ranks afresh `num_repeats` times, one after another; the first exit code that is not 0.

    Ranks that only measured again would share an allocator, a communicator and warm caches, and their spread
    would not be that of runs.
    """
    for repeat in range(num_repeats):
        args = (*run_args, "--repeat", str(repeat))
        code = run_live(local_command(plan, run_args=args, python=sys.executable))
        if code:
            return code
    return 0


def num_gpus_here(run: Runner) -> int:
    """GPUs that the driver lists; 0 without a driver."""
    lines = run(("nvidia-smi", "--list-gpus")).stdout.splitlines()
    return sum(line.startswith("GPU ") for line in lines)
