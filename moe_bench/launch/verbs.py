"""What `moe-bench submit` does, from a recipe to the lines that it prints."""

from __future__ import annotations

import shlex
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from moe_bench.errors import BadInputError
from moe_bench.launch.environment import Allocation, allocation_from, current_environment
from moe_bench.launch.job import Job
from moe_bench.launch.ledger import SubmittedJob, add_to_ledger
from moe_bench.launch.runner import run_captured, run_live
from moe_bench.launch.slurm import Installation, this_installation
from moe_bench.launch.slurm_state import job_output
from moe_bench.launch.submit import (
    Submission,
    cluster_name,
    command_to_submit,
    plan_job,
    run_here,
    runs_here,
    submit,
    wait_for,
)
from moe_bench.launch.variants import PlannedJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of it: a job in the queue, a command that was only printed, or a run that has ended."""

    lines: tuple[str, ...] = ()
    exit_code: int = 0
    command: tuple[str, ...] = ()
    submission: Submission | None = None

    def as_json(self) -> dict[str, object]:
        """The job and how to follow it, or the command alone."""
        return {"command": self.command} if self.submission is None else asdict(self.submission)

    def wait(self) -> int:
        """Stay until the job has ended, and give its exit code."""
        if self.submission is None:
            return self.exit_code
        return wait_for(self.submission.job_id, run=run_captured, sleep=time.sleep)


def job_verb(planned: PlannedJob, *, data_root: Path, site: str | None, num_nodes: int | None) -> Job:
    """The job of `planned` on the site that is asked for or that this cluster is; nothing is queued yet.

    Raises BadInputError or MissingRequirementError where its ranks could not start.
    """
    return plan_job(
        planned.plan.recipe,
        run_args=planned.run_args,
        data_root=data_root,
        site=site,
        num_nodes=num_nodes,
        run=run_captured,
    )


def runs_with_this_python(job: Job, *, data_root: Path) -> bool:
    """Whether the ranks of `job` import what this interpreter does: no image, and no other interpreter."""
    return job.image is None and this_installation(data_root, current_environment()).python == sys.executable


def submit_verb(
    planned: PlannedJob,
    job: Job,
    *,
    data_root: Path,
    results_root: Path,
    dry_run: bool,
    inside_job: bool,
) -> Outcome:
    """Queue a job, print the command that would (`dry_run`), or run it in the job that this process is in.

    Every job gets a line in the ledger below `results_root`. `inside_job` is set by
    slurm/run_recipe.sh: a job of exactly the right size runs the recipe, any other is only the submitter.
    Raises SchedulerError, MissingRequirementError, BadInputError, MeasurementError.
    """
    environment = current_environment()
    installation = this_installation(data_root, environment)
    if dry_run:
        command = command_to_submit(job, installation, environment)
        return Outcome(lines=(shlex.join(command),), command=command)
    allocation = allocation_from(environment)
    if inside_job and allocation is None:
        raise BadInputError("--inside-job: this process is in no Slurm job; leave it out")
    if inside_job and allocation is not None and runs_here(job, allocation):
        if not (allocation.is_sized or allocation.num_restarts):
            add_to_ledger(results_root, _asked_by_hand(planned, job, installation, allocation))
        code = run_here(job, installation, allocation, run=run_captured, run_live=run_live)
        return Outcome(exit_code=code)
    submission = submit(job, installation, env=environment, run=run_captured)
    add_to_ledger(
        results_root,
        _ledger_line(planned, job, job_id=submission.job_id, log=submission.log, command=submission.command),
    )
    lines = (
        f"submitted job {submission.job_id}: {job.recipe.name} on {submission.job_size}, "
        f"site {job.site_name}",
        *(f"  {line}" for line in submission.follow),
    )
    return Outcome(lines=lines, command=submission.command, submission=submission)


def _asked_by_hand(
    planned: PlannedJob, job: Job, installation: Installation, allocation: Allocation
) -> SubmittedJob:
    """The line of a job that the user asked for with sbatch at exactly the right size."""
    return _ledger_line(
        planned,
        job,
        job_id=allocation.job_id,
        log=job_output(allocation.job_id, run_captured),
        command=(str(installation.script), *planned.run_args),
    )


def _ledger_line(
    planned: PlannedJob, job: Job, *, job_id: int, log: str, command: tuple[str, ...]
) -> SubmittedJob:
    return SubmittedJob(
        job_id=job_id,
        cluster=cluster_name(run_captured),
        submitted_at=datetime.now(UTC).isoformat(timespec="seconds"),
        plan=planned.plan,
        repeat=planned.repeat,
        job_size=str(job.size),
        time_limit_s=job.time_limit_s,
        log=log,
        command=command,
    )
