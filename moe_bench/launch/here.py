"""Starts a GPU run's ranks on this machine, after making sure that its GPUs are enough."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from moe_bench.errors import MissingRequirementError
from moe_bench.launch.local import local_command
from moe_bench.launch.runner import Runner
from moe_bench.spec.recipe import Recipe


def num_gpus_here(run: Runner) -> int:
    """GPUs that nvidia-smi lists; 0 where there is no such program."""
    done = run(("nvidia-smi", "--list-gpus"))
    return sum(line.startswith("GPU ") for line in done.stdout.splitlines()) if done.returncode == 0 else 0


def require_gpus_here(recipe: Recipe, *, asked: str, run: Runner) -> None:
    """Raise MissingRequirementError, with what to type instead, where `recipe` needs more GPUs than are here."""
    num_gpus = num_gpus_here(run)
    if num_gpus < recipe.parallel.num_gpus:
        raise MissingRequirementError(
            f"{asked} needs {recipe.parallel.num_gpus} GPUs ({recipe.system.display_name}), "
            f"this machine has {num_gpus}; try --scale smoke, --scale node, or sbatch slurm/run_recipe.sh {asked}"
        )


def start_ranks_here(recipe: Recipe, *, asked: str, run_args: tuple[str, ...], run: Runner) -> NoReturn:
    """Replace this process by torchrun with one rank per GPU; `run_args` is what follows `moe-bench run`."""
    require_gpus_here(recipe, asked=asked, run=run)
    command = local_command(recipe, run_args=run_args, python=sys.executable)
    os.execvp(command[0], command)
