"""The one place that reads this process's environment, and what of it concerns a launch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

SIZED = "MOE_BENCH_SIZED"
"""Set in a job that `submit` has sized, so that it can never submit another one."""
CONTAINER = "MOE_BENCH_CONTAINER"
"""Set in every rank that runs in a container, to the image, for the record."""
PYTHON = "MOE_BENCH_PYTHON"
"""Interpreter that has moe_bench installed; slurm/run_recipe.sh then makes no environment."""

_KEPT = ("HOME", "LOGNAME", "USER", "PATH", "SLURM_CONF")
_KEPT_DEFAULTS = ("SBATCH_ACCOUNT", "SBATCH_PARTITION", "SBATCH_QOS", "SBATCH_RESERVATION")
"""A user's own defaults for sbatch; a site's file, being on the command line, goes before them."""


def current_environment() -> dict[str, str]:
    """A copy of this process's environment."""
    return dict(os.environ)


def clean_environment(env: Mapping[str, str], *, also: tuple[str, ...], python: str) -> dict[str, str]:
    """What a job may inherit from the shell or job that submits it.

    Variables of a surrounding job would change the new one (SLURM_MEM_PER_CPU, SLURM_NTASKS_PER_NODE and
    their like are options to srun); a shell's own NCCL_ or PYTHONPATH would be hidden inputs of the run.
    """
    kept = {name: env[name] for name in (*_KEPT, *_KEPT_DEFAULTS, *also) if name in env}
    return kept | {PYTHON: python, SIZED: "1"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The Slurm job that this process runs in."""

    job_id: int
    node_list: str
    num_nodes: int
    num_tasks: int
    gpus_per_node: int
    is_sized: bool
    """Submitted by moe_bench with the size that it needs."""
    num_restarts: int
    """How often Slurm has queued the job again."""
    partition: str | None
    account: str | None


def allocation_from(env: Mapping[str, str]) -> Allocation | None:
    """The job that `env` belongs to; None outside Slurm."""
    if "SLURM_JOB_ID" not in env:
        return None
    num_nodes = int(env["SLURM_JOB_NUM_NODES"])
    return Allocation(
        job_id=int(env["SLURM_JOB_ID"]),
        node_list=env["SLURM_JOB_NODELIST"],
        num_nodes=num_nodes,
        # not set in a job that asked for no number of tasks: one per node
        num_tasks=int(env.get("SLURM_NTASKS", num_nodes)),
        # not set in a job that asked for no GPUs
        gpus_per_node=int(env.get("SLURM_GPUS_ON_NODE", 0)),
        is_sized=env.get(SIZED) == "1",
        # not set in a job's first life
        num_restarts=int(env.get("SLURM_RESTART_COUNT", 0)),
        partition=env.get("SLURM_JOB_PARTITION"),
        account=env.get("SLURM_JOB_ACCOUNT"),
    )
