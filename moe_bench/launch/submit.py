"""Queues a job, or starts the run when this process is already inside a job of the right size."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import EXIT_CODES, MeasurementError, MissingRequirementError, SchedulerError
from moe_bench.launch.environment import Allocation, allocation_from
from moe_bench.launch.job import Job, job_size
from moe_bench.launch.job_state import SLURM_STATES, JobState
from moe_bench.launch.rendezvous import first_host, master_port, node_address
from moe_bench.launch.runner import NOT_INSTALLED, Runner
from moe_bench.launch.site import find_site
from moe_bench.launch.slurm import Installation, log_path, sbatch_command, srun_command
from moe_bench.results.published import row_by_id
from moe_bench.spec.recipe import Recipe

POLL_S = 2.0
MAX_RESTARTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A job in the queue."""

    job_id: int
    job_size: str
    command: tuple[str, ...]
    log: str
    follow: tuple[str, ...]
    """Commands that show its output, its state, and end it."""


def plan_job(
    recipe: Recipe,
    *,
    run_args: tuple[str, ...],
    data_root: Path,
    site: str | None,
    num_nodes: int | None,
    run: Runner,
) -> Job:
    """The job that runs `recipe`, with the site that is asked for or that this cluster is.

    `run_args` is what follows `moe-bench run`; `data_root` holds `slurm/` and `results/published/`. Raises
    BadInputError or MissingRequirementError where its ranks could not start.
    """
    cluster = None if site is not None else cluster_name(run)
    site_name, found = find_site(data_root / "slurm" / "sites", asked=site, cluster=cluster)
    job = Job(
        recipe=recipe,
        run_args=run_args,
        site_name=site_name,
        site=found,
        size=job_size(recipe, num_nodes=num_nodes),
        num_nodes_asked=num_nodes,
        expected_step_s=expected_step_s(recipe, data_root / "results" / "published"),
    )
    job.require_startable()
    return job


def expected_step_s(recipe: Recipe, published: Path) -> float | None:
    """tokens per step / (published tokens per second and GPU x GPUs), of the row that `recipe` reproduces.

    A member of a scaling family is taken to be as fast per GPU as the recipe that it comes from. None where
    neither names a row, the row prints no throughput, or there is no GPU.
    """
    row_id = recipe.reproduces or (recipe.origin.row if recipe.origin is not None else None)
    if row_id is None or recipe.system.gpu is None:
        return None
    tokens_per_s_per_gpu = row_by_id(published, row_id).tokens_per_s_per_gpu
    if tokens_per_s_per_gpu is None:
        return None
    return recipe.tokens_per_step / (tokens_per_s_per_gpu * recipe.parallel.num_gpus)


def cluster_name(run: Runner) -> str | None:
    """`ClusterName` of the Slurm that this machine talks to; None where it talks to none."""
    done = run(("scontrol", "show", "config"))
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "ClusterName":
            return value.strip()
    return None


def command_to_submit(job: Job, installation: Installation, env: Mapping[str, str]) -> tuple[str, ...]:
    """What `submit` runs; inside a job, that job's partition and account serve where the site names none."""
    inside = allocation_from(env)
    return sbatch_command(
        job,
        installation,
        env=env,
        partition=None if inside is None else inside.partition,
        account=None if inside is None else inside.account,
    )


def submit(job: Job, installation: Installation, *, env: Mapping[str, str], run: Runner) -> Submission:
    """Queue `job`. Raises SchedulerError with the scheduler's own words and the command to type elsewhere."""
    command = command_to_submit(job, installation, env)
    inside = allocation_from(env)
    if inside is not None and not job.site.submit_from_jobs:
        raise SchedulerError(f"site {job.site_name!r} forbids sbatch inside a job{_to_type(command)}")
    done = run(command)
    if done.returncode == NOT_INSTALLED:
        raise MissingRequirementError(
            "sbatch is not on this machine; submit from a login node of the cluster"
        )
    if done.returncode:
        raise SchedulerError(f"{done.stderr.strip()}{_to_type(command)}")
    # --parsable prints `id` or `id;cluster`
    job_id = int(done.stdout.split(";")[0])
    log = log_path(job, installation, job_id=str(job_id))
    follow = (f"tail -n +1 -F {shlex.quote(log)}", f"scontrol show job {job_id}", f"scancel {job_id}")
    return Submission(job_id=job_id, job_size=str(job.size), command=command, log=log, follow=follow)


def runs_here(job: Job, allocation: Allocation | None) -> bool:
    """Whether this process is in a job of exactly the size that `job` needs.

    Raises SchedulerError where moe_bench itself has asked for this job and it came out otherwise: submitting
    once more would never end.
    """
    if allocation is None:
        return False
    size = job.size
    gpus_agree = job.site.gpu_request == "none" or allocation.gpus_per_node == size.gpus_per_node
    fits = (allocation.num_nodes, allocation.num_tasks) == (size.num_nodes, size.num_tasks) and gpus_agree
    if allocation.is_sized and not fits:
        raise SchedulerError(
            f"job {allocation.job_id} was submitted for {size} and has {allocation.num_nodes} nodes, "
            f"{allocation.num_tasks} tasks, {allocation.gpus_per_node} GPUs per node; see `gpu_request` and "
            f"`sbatch_args` of site {job.site_name!r}"
        )
    return fits


def run_here(
    job: Job,
    installation: Installation,
    allocation: Allocation,
    *,
    run: Runner,
    run_live: Callable[[Sequence[str]], int],
) -> int:
    """Start every rank in this allocation, stay until all have ended, and give the run's own exit code.

    Raises MeasurementError where a rank was killed or a node was lost; the latter queues the job again.
    """
    command = srun_command(
        job,
        installation,
        job_id=allocation.job_id,
        master_addr=node_address(first_host(allocation.node_list, run), run),
        master_port=master_port(allocation.job_id),
    )
    code = run_live(command)
    known = {known for known, _ in EXIT_CODES}
    if code not in known - {MeasurementError.exit_code} and not all_nodes_answer(allocation, run):
        raise MeasurementError(f"a node of job {allocation.job_id} was lost; {queue_again(allocation, run)}")
    # srun returns the highest code of all ranks, and 128 + signal for one that was killed
    if code not in known:
        raise MeasurementError(f"srun ended with {code}: a rank was killed; its lines above say which")
    return code


def all_nodes_answer(allocation: Allocation, run: Runner) -> bool:
    """Whether every node of the job still starts processes.

    The ranks notice a lost node long before Slurm does (SlurmdTimeout is five minutes where nothing is said),
    and a job that has ended is not queued again.
    """
    num_nodes = str(allocation.num_nodes)
    probe = (
        "srun",
        "--overlap",
        f"--nodes={num_nodes}",
        f"--ntasks={num_nodes}",
        "--ntasks-per-node=1",
        "true",
    )
    return run(probe).returncode == 0


def queue_again(allocation: Allocation, run: Runner) -> str:
    """Ask Slurm to start the job once more, and say what came of it."""
    if allocation.num_restarts >= MAX_RESTARTS:
        return f"it has been queued again {allocation.num_restarts} times already and ends here"
    done = run(("scontrol", "requeue", str(allocation.job_id)))
    return done.stderr.strip() if done.returncode else "the job is queued again"


def wait_for(job_id: int, *, run: Runner, sleep: Callable[[float], None]) -> int:
    """Stay until the job has ended, and give its exit code; 1 where Slurm or a signal ended it.

    Raises SchedulerError where the scheduler no longer knows the job.
    """
    while True:
        done = run(("scontrol", "show", "job", str(job_id)))
        if done.returncode:
            raise SchedulerError(done.stderr.strip())
        fields = dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
        if SLURM_STATES.get(fields["JobState"], JobState.UNKNOWN).has_ended:
            code = int(fields["ExitCode"].split(":")[0])
            return code or (0 if fields["JobState"] == "COMPLETED" else 1)
        sleep(POLL_S)


def _to_type(command: Sequence[str]) -> str:
    return f"; to submit it from a login node, type:\n{shlex.join(command)}"
