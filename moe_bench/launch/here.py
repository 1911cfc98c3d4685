"""Starts the ranks of a recipe on the GPUs of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from moe_bench.errors import MissingRequirementError
from moe_bench.launch.local import local_command
from moe_bench.launch.runner import Runner
from moe_bench.spec.recipe import Recipe

Execute = Callable[[str, tuple[str, ...]], object]


def require_gpus_here(recipe: Recipe, *, asked: str, run: Runner) -> None:
    """Raise MissingRequirementError where this machine has fewer GPUs than `recipe`, named `asked`, needs."""
    num_needed, num_here = recipe.parallel.num_gpus, num_gpus_here(run)
    if num_here < num_needed:
        smaller = f"--scale node --num-gpus {num_here}" if num_here else "--scale smoke"
        raise MissingRequirementError(
            f"{asked} needs {num_needed} GPUs and this machine has {num_here}; "
            f"run a smaller one with {smaller}, or this one with `sbatch slurm/run_recipe.sh {asked}`"
        )


def start_ranks_here(recipe: Recipe, *, run_args: tuple[str, ...], execute: Execute = os.execvp) -> None:
    """Replace this process by torchrun with one rank per GPU; `run_args` is what followed `moe-bench run`."""
    command = local_command(recipe, run_args=run_args, python=sys.executable)
    execute(command[0], command)


def repeat_ranks_here(
    recipe: Recipe, *, run_args: tuple[str, ...], num_repeats: int, run_live: Callable[[Sequence[str]], int]
) -> int:
    """Start all ranks afresh `num_repeats` times, one after another; the first exit code that is not 0.

    Ranks that only measured again would share an allocator, a communicator and warm caches, and their spread
    would not be that of runs.
    """
    for repeat in range(num_repeats):
        args = (*run_args, "--repeat", str(repeat))
        code = run_live(local_command(recipe, run_args=args, python=sys.executable))
        if code:
            return code
    return 0


def num_gpus_here(run: Runner) -> int:
    """GPUs that the driver lists; 0 without a driver."""
    lines = run(("nvidia-smi", "--list-gpus")).stdout.splitlines()
    return sum(line.startswith("GPU ") for line in lines)
