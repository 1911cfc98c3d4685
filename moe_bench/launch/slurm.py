"""The command lines of a Slurm job, as token lists: `sbatch` for the job, `srun` for its ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moe_bench.launch.environment import CONTAINER, PYTHON, clean_environment
from moe_bench.launch.job import Job
from moe_bench.launch.local import MODULE, env_prefix, torchrun

STEP_WAIT_S = 20
"""After the first rank has ended, the others get this long: none may be left 30 s after a rank has died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """Where moe_bench stands on the machines of a cluster."""

    script: Path
    """slurm/run_recipe.sh, in the checkout or in the wheel."""
    python: str
    """Interpreter of the bare environment."""
    workdir: Path
    """Where the job runs; its log goes there."""
    source: Path | None
    """The checkout whose code runs in containers too; None for a wheel, which the image must then hold."""


def this_installation(data_root: Path, env: Mapping[str, str]) -> Installation:
    """The one that is running: `data_root` holds `slurm/`, and the working directory stays the job's."""
    is_checkout = (data_root / "pyproject.toml").is_file()
    return Installation(
        script=data_root / "slurm" / "run_recipe.sh",
        python=env.get(PYTHON, sys.executable),
        workdir=Path.cwd(),
        source=data_root if is_checkout else None,
    )


def sbatch_command(
    job: Job,
    installation: Installation,
    *,
    env: Mapping[str, str],
    partition: str | None = None,
    account: str | None = None,
) -> tuple[str, ...]:
    """The whole command that queues `job`, with the environment it gets and nothing else.

    `partition` and `account` (of the job that submits) serve where the site names none. The clean environment
    is made here rather than with --export=NIL, which would drop PATH and load the user's login files.
    """
    site, size = job.site, job.size
    options = {
        "job-name": job.name,
        "nodes": str(size.num_nodes),
        "ntasks-per-node": str(size.tasks_per_node),
        "cpus-per-task": None if site.cpus_per_task is None else str(site.cpus_per_task),
        "time": slurm_time(job.time_limit_s),
        "partition": site.partition or partition,
        "account": site.account or account,
        "chdir": str(installation.workdir),
        "output": log_path(job, installation, job_id="%j"),
    }
    return (
        *("env", "--ignore-environment"),
        *_assignments(clean_environment(env, also=site.pass_environment, python=installation.python)),
        *("sbatch", "--parsable", "--export=ALL", "--requeue", "--open-mode=append"),
        *(f"--{name}={value}" for name, value in options.items() if value is not None),
        *_gpu_request(job),
        *(("--exclusive",) if site.exclusive else ()),
        *site.sbatch_args,
        str(installation.script),
        *job.run_args,
        *(() if job.num_nodes_asked is None else ("--nodes", str(job.num_nodes_asked))),
        *("--site", job.site_name),
    )


def srun_command(
    job: Job,
    installation: Installation,
    *,
    job_id: int,
    master_addr: str,
    master_port: int,
    verb: str = "run",
) -> tuple[str, ...]:
    """The command that starts every rank of `moe-bench <verb>`, inside a job of the right size.

    Ranks fill one node after the other (`--distribution=block`), as the process groups expect. A rank that
    fails does not kill the others at once: they end by themselves with their own exit code, or after
    STEP_WAIT_S.
    """
    site, size = job.site, job.size
    by_torchrun = site.launcher == "torchrun"
    tasks_per_node = 1 if by_torchrun else size.tasks_per_node
    container_options, container_command, python = _container(job, installation)
    meeting = {} if by_torchrun else {"MASTER_ADDR": master_addr, "MASTER_PORT": str(master_port)}
    start = (
        torchrun(
            num_nodes=size.num_nodes,
            ranks_per_node=size.tasks_per_node,
            meet_at=(
                "--rdzv-backend=c10d",
                f"--rdzv-id={job_id}",
                f"--rdzv-endpoint={master_addr}:{master_port}",
            ),
        )
        if by_torchrun
        else ()
    )
    return (
        "srun",
        f"--nodes={size.num_nodes}",
        f"--ntasks={size.num_nodes * tasks_per_node}",
        f"--ntasks-per-node={tasks_per_node}",
        # srun does not take it over from sbatch since Slurm 22.05
        *(() if site.cpus_per_task is None else (f"--cpus-per-task={_cpus_per_srun_task(job)}",)),
        *("--distribution=block", "--export=ALL", "--kill-on-bad-exit=0", f"--wait={STEP_WAIT_S}"),
        *site.srun_args,
        *container_options,
        *container_command,
        *env_prefix(job.rank_env | _container_env(job, installation) | meeting),
        python,
        *start,
        *("-m", MODULE, verb),
        *job.run_args,
    )


def log_path(job: Job, installation: Installation, *, job_id: str) -> str:
    """Where the output of the job goes; `%j` stands for its number until it has one."""
    return str(installation.workdir / f"slurm-{job.name}-{job_id}.out")


def slurm_time(limit_s: int) -> str:
    """`limit_s` as Slurm reads it: hours:minutes:seconds."""
    minutes, seconds = divmod(limit_s, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def _gpu_request(job: Job) -> tuple[str, ...]:
    num_gpus = job.size.gpus_per_node
    if not num_gpus or job.site.gpu_request == "none":
        return ()
    if job.site.gpu_request == "gres":
        return (f"--gres=gpu:{num_gpus}",)
    return (f"--gpus-per-node={num_gpus}",)


def _cpus_per_srun_task(job: Job) -> int:
    cpus_per_rank = job.site.cpus_per_task or 1
    return cpus_per_rank * job.size.tasks_per_node if job.site.launcher == "torchrun" else cpus_per_rank


def _container(job: Job, installation: Installation) -> tuple[tuple[str, ...], tuple[str, ...], str]:
    """Options of srun, the command in front of the rank's own, and the interpreter."""
    image, workdir = job.image, str(installation.workdir)
    own = (installation.workdir, *(() if installation.source is None else (installation.source,)))
    mounts = ",".join((*(f"{path}:{path}" for path in dict.fromkeys(own)), *job.site.container_mounts))
    if image is None:
        return (), (), installation.python
    if job.site.runtime == "pyxis":
        options = (
            f"--container-image={image}",
            f"--container-mounts={mounts}",
            f"--container-workdir={workdir}",
        )
        return options, (), "python3"
    return (), ("apptainer", "exec", "--nv", f"--bind={mounts}", f"--pwd={workdir}", image), "python3"


def _container_env(job: Job, installation: Installation) -> dict[str, str]:
    """On the command line, because pyxis lets an image's own variables win over the job's."""
    if job.image is None:
        return {}
    source = {} if installation.source is None else {"PYTHONPATH": str(installation.source)}
    return {CONTAINER: job.image, **source}


def _assignments(env: Mapping[str, str]) -> tuple[str, ...]:
    return tuple(f"{name}={value}" for name, value in sorted(env.items()))
