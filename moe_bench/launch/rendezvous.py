"""Where the ranks of a job meet, and which of them this process is, from srun's or torchrun's variables."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from moe_bench.errors import MissingRequirementError
from moe_bench.launch.runner import Runner
from moe_bench.spec.rendezvous import Rendezvous

FIRST_PORT = 10_000
NUM_PORTS = 20_000
"""Ports 10000 to 29999: below the kernel's range for outgoing connections (32768 to 60999 on Linux)."""
NUM_ORDINARY_STEPS = 0xFFFFFFF0
"""Step ids from here on are Slurm's own: interactive, batch, extern (slurm.h, SLURM_MAX_NORMAL_STEP_ID)."""


def rendezvous_from(env: Mapping[str, str], run: Runner) -> Rendezvous | None:
    """This process's rank; None where nobody started it as one of several, so that it may start its own.

    torchrun goes before srun, because it may run inside an srun task. Raises MissingRequirementError where
    srun's tasks cannot tell where to meet.
    """
    if "TORCHELASTIC_RUN_ID" in env:
        return Rendezvous(
            rank=int(env["RANK"]),
            world_size=int(env["WORLD_SIZE"]),
            local_rank=int(env["LOCAL_RANK"]),
            master_addr=env["MASTER_ADDR"],
            master_port=int(env["MASTER_PORT"]),
        )
    if not is_one_of_several_tasks(env):
        return None
    return Rendezvous(
        rank=int(env["SLURM_PROCID"]),
        world_size=int(env["SLURM_STEP_NUM_TASKS"]),
        local_rank=int(env["SLURM_LOCALID"]),
        master_addr=env.get("MASTER_ADDR") or first_host(env["SLURM_STEP_NODELIST"], run),
        master_port=int(env.get("MASTER_PORT") or master_port(int(env["SLURM_JOB_ID"]))),
    )


def lone_rank(env: Mapping[str, str]) -> Rendezvous:
    """The only rank of a job that srun or nobody started, which meets itself at this host."""
    port = master_port(int(env.get("SLURM_JOB_ID", os.getpid())))
    return Rendezvous(rank=0, world_size=1, local_rank=0, master_addr="127.0.0.1", master_port=port)


def is_one_of_several_tasks(env: Mapping[str, str]) -> bool:
    """Whether srun started this process beside others.

    A batch script has SLURM_PROCID too, so only the step tells. A lone task, such as a shell under
    `srun --pty`, is a place to start ranks from.
    """
    step = int(env.get("SLURM_STEP_ID", NUM_ORDINARY_STEPS))
    return step < NUM_ORDINARY_STEPS and int(env["SLURM_STEP_NUM_TASKS"]) > 1


def master_port(job_id: int) -> int:
    """FIRST_PORT + job_id mod NUM_PORTS: every task can tell it, and jobs that share a node differ."""
    return FIRST_PORT + job_id % NUM_PORTS


def first_host(node_list: str, run: Runner) -> str:
    """Name of the first node of a list such as `n[1-2]`."""
    return _scontrol(("scontrol", "show", "hostnames", node_list), run).split()[0]


def node_address(node: str, run: Runner) -> str:
    """The address at which Slurm itself reaches `node`: a node's name need not resolve, its address must."""
    fields = _scontrol(("scontrol", "show", "node", node), run).split()
    return next(field.removeprefix("NodeAddr=") for field in fields if field.startswith("NodeAddr="))


def _scontrol(command: Sequence[str], run: Runner) -> str:
    done = run(command)
    if done.returncode:
        raise MissingRequirementError(f"{' '.join(command)}: {done.stderr.strip()}; set MASTER_ADDR")
    return done.stdout
