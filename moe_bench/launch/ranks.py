"""Starts the ranks of one run after another, each time anew: on this machine, or on nodes of the Slurm job.

Runs that are compared have other numbers of ranks and other variables, which a process reads once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import MeasurementError, MissingRequirementError
from moe_bench.launch.environment import Allocation, allocation_from
from moe_bench.launch.here import num_gpus_here
from moe_bench.launch.job import job_size
from moe_bench.launch.local import MODULE, env_prefix, torchrun
from moe_bench.launch.rendezvous import first_host, master_port, node_address
from moe_bench.launch.runner import Runner
from moe_bench.launch.slurm import srun_command, this_installation
from moe_bench.launch.submit import plan_job
from moe_bench.spec.rendezvous import Launcher
from moe_bench.spec.scale import Plan


def launcher_for(plans: Sequence[Plan], env: Mapping[str, str]) -> Launcher | None:
    """What starts the ranks of `plans` where nobody says it; None where none needs a GPU, so that they fork.

    torchrun holds one machine, also one of a Slurm job; several nodes are srun's.
    """
    if all(plan.recipe.system.gpu is None for plan in plans):
        return None
    is_spread = max(job_size(plan.recipe).num_nodes for plan in plans) > 1
    return "srun" if is_spread and allocation_from(env) is not None else "torchrun"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankStarter:
    """Starts all ranks of a run and waits for their end."""

    launcher: Launcher
    data_root: Path
    """Of the installation; holds `slurm/`."""
    site: str | None
    """Of srun; None for the one that this cluster is."""
    env: Mapping[str, str]
    run: Runner
    run_live: Callable[[Sequence[str]], int]

    def require_room(self, plan: Plan) -> None:
        """Raise MissingRequirementError where this machine, or the job, cannot hold the ranks of `plan`."""
        if self.launcher == "torchrun":
            self._require_gpus_here(plan)
            return
        has, size = self._allocation(), job_size(plan.recipe)
        if has.num_nodes < size.num_nodes or has.gpus_per_node < size.gpus_per_node:
            raise MissingRequirementError(
                f"{plan.asked} needs {size}, and job {has.job_id} has {has.num_nodes} nodes with "
                f"{has.gpus_per_node} GPUs each; ask for a job of that size"
            )

    def start(self, plan: Plan, verb: str, arguments: tuple[str, ...]) -> None:
        """Start `moe-bench <verb> <arguments>` as every rank of `plan`; MeasurementError where one fails."""
        code = self.run_live(self.command(plan, verb, arguments))
        if code:
            raise MeasurementError(
                f"{plan.asked}: {self.launcher} ended with {code}; the lines of its ranks above say why"
            )

    def command(self, plan: Plan, verb: str, arguments: tuple[str, ...]) -> tuple[str, ...]:
        """What starts the ranks."""
        if self.launcher == "torchrun":
            return (
                *env_prefix(plan.recipe.env),
                sys.executable,
                *torchrun(num_nodes=1, ranks_per_node=plan.num_ranks, meet_at=("--standalone",)),
                *("-m", MODULE, verb, *arguments),
            )
        has = self._allocation()
        job = plan_job(
            plan.recipe,
            run_args=arguments,
            data_root=self.data_root,
            site=self.site,
            num_nodes=None,
            run=self.run,
        )
        return srun_command(
            job,
            this_installation(self.data_root, self.env),
            job_id=has.job_id,
            master_addr=node_address(first_host(has.node_list, self.run), self.run),
            master_port=master_port(has.job_id),
            verb=verb,
        )

    def _require_gpus_here(self, plan: Plan) -> None:
        num_here = 0 if plan.recipe.system.gpu is None else num_gpus_here(self.run)
        if plan.recipe.system.gpu is None or num_here >= plan.num_ranks:
            return
        smaller = f"--scale node --num-gpus {num_here}" if num_here else "--scale smoke"
        raise MissingRequirementError(
            f"{plan.asked} needs {plan.num_ranks} GPUs and this machine has {num_here}; take {smaller}, or a "
            "Slurm job that holds them"
        )

    def _allocation(self) -> Allocation:
        allocation = allocation_from(self.env)
        if allocation is None:
            raise MissingRequirementError(
                "srun starts ranks in a Slurm job, and this process is in none; begin one with salloc or "
                "sbatch, or take --launcher torchrun"
            )
        return allocation
