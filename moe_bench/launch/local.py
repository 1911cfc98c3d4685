"""The command line of a run on this machine: one process that forks its ranks, or torchrun for GPUs."""

from __future__ import annotations

from collections.abc import Mapping

from moe_bench.spec.scale import Plan

MODULE = "moe_bench"


def local_command(plan: Plan, *, run_args: tuple[str, ...], python: str) -> tuple[str, ...]:
    """The command that runs `plan` here; `run_args` is what follows `moe-bench run`.

    Without GPUs it is one process, which forks its ranks after the imports that they share.
    """
    start: tuple[str, ...] = ()
    if plan.recipe.system.gpu is not None:
        start = torchrun(num_nodes=1, ranks_per_node=plan.num_ranks, meet_at=("--standalone",))
    return (*env_prefix(plan.recipe.env), python, *start, "-m", MODULE, "run", *run_args)


def torchrun(*, num_nodes: int, ranks_per_node: int, meet_at: tuple[str, ...]) -> tuple[str, ...]:
    """torchrun's part of a command, behind the interpreter."""
    return (
        *("-m", "torch.distributed.run"),
        f"--nnodes={num_nodes}",
        f"--nproc-per-node={ranks_per_node}",
        *meet_at,
    )


def env_prefix(env: Mapping[str, str]) -> tuple[str, ...]:
    """`env NAME=value ...`, to stand in front of a rank's command: visible, and good inside containers."""
    assignments = tuple(f"{name}={value}" for name, value in sorted(env.items()))
    return ("env", *assignments) if assignments else ()
