"""What `moe-bench submit` does in a login shell and inside a job, put together from this folder's parts."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import SchedulerError
from moe_bench.launch.environment import allocation_from, current_environment
from moe_bench.launch.runner import run_captured, run_live
from moe_bench.launch.slurm import Installation
from moe_bench.launch.submit import command_to_submit, plan_job, run_here, runs_here, submit, wait_for
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What to tell the user, and the exit code."""

    lines: tuple[str, ...]
    exit_code: int = 0
    job_id: int | None = None
    command: tuple[str, ...] = ()

    def as_json(self) -> dict[str, object]:
        """The same for scripts."""
        return {"job_id": self.job_id, "command": list(self.command), "exit_code": self.exit_code}


def submit_verb(
    recipe: Recipe,
    *,
    run_args: tuple[str, ...],
    data_root: Path,
    site: str | None,
    num_nodes: int | None,
    wait: bool,
    dry_run: bool,
    inside_job: bool,
) -> Outcome:
    """Queue `recipe`; inside a job that already has the right size, run it there instead."""
    environment = current_environment()
    job = plan_job(
        recipe, run_args=run_args, data_root=data_root, site=site, num_nodes=num_nodes, run=run_captured
    )
    installation = Installation(
        script=data_root / "slurm" / "run_recipe.sh", python=sys.executable, workdir=Path.cwd()
    )
    allocation = allocation_from(environment)
    if inside_job and allocation is None:
        raise SchedulerError("--inside-job is for slurm/run_recipe.sh; this process is in no Slurm job")
    if inside_job and allocation is not None and runs_here(job, allocation):
        code = run_here(job, installation, allocation, run=run_captured, run_live=run_live)
        return Outcome(lines=(), exit_code=code)
    if dry_run:
        command = command_to_submit(job, installation, environment)
        return Outcome(lines=(shlex.join(command),), command=command)
    submission = submit(job, installation, env=environment, run=run_captured)
    lines = (
        f"submitted job {submission.job_id}: {recipe.name} on {submission.job_size}, site {job.site_name}",
        *(f"  {command}" for command in submission.follow),
    )
    code = wait_for(submission.job_id, run=run_captured, sleep=time.sleep) if wait else 0
    return Outcome(lines=lines, exit_code=code, job_id=submission.job_id, command=submission.command)
