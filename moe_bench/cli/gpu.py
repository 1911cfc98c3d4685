"""What verbs that measure on one GPU share: which it is, what stands for it, and how a run goes on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.spec.catalogue import SYSTEMS_FOLDER

if TYPE_CHECKING:
    from moe_bench.spec.load import Loader
    from moe_bench.spec.system import SystemSpec

DEFAULT_SYSTEM = "h100_sxm"
"""Whose laws give the estimates where there is no GPU."""
INTERRUPTED = 130
"""128 and the signal's number, as shells have it."""

ResumeOption = Annotated[bool, typer.Option("--resume", help="Go on with the newest unfinished one.")]
PlannedSystemOption = Annotated[
    str | None, typer.Option("--system", help="With --plan: system to estimate for.")
]


def gpu_here() -> str | None:
    """Name of the first GPU that the driver lists, which is that of torch; None without one."""
    from moe_bench.launch.here import num_gpus_here
    from moe_bench.launch.runner import run_captured

    return None if num_gpus_here(run_captured) == 0 else gpu_fact("name")


def gpu_fact(field: str) -> str:
    """What the driver says of its first GPU; `field` as nvidia-smi names it."""
    from moe_bench.launch.runner import run_captured

    answer = run_captured(("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"))
    return answer.stdout.strip().splitlines()[0].strip()


def gpu_to_measure_on(verb: str, system: str | None, *, tiny: bool, toys: str) -> str | None:
    """The GPU of this machine; None where there is none and `tiny` runs `toys` on the CPU.

    Raises BadInputError for a `system` to estimate for, MissingRequirementError for real sizes without a GPU.
    """
    if system is not None:
        raise BadInputError("--system estimates without a GPU; add --plan, or drop it")
    gpu = gpu_here()
    if gpu is None and not tiny:
        raise MissingRequirementError(
            f"{verb} needs a GPU and this machine has none; see what would run with --plan, or run {toys} on "
            "the CPU with --tiny"
        )
    return gpu


def system_of_gpu(name: str, loader: Loader) -> SystemSpec:
    keys = sorted(path.stem for path in (loader.root / SYSTEMS_FOLDER).glob("*.yaml"))
    systems = [loader.system(key) for key in keys]
    for one in systems:
        if one.gpu is not None and one.gpu.device_name == name:
            return one
    raise BadInputError(
        f"{name}: no system has this GPU; add recipes/systems/<name>.yaml with its datasheet figures"
    )


def system_for_plan(key: str | None, loader: Loader) -> SystemSpec:
    if key is not None:
        return loader.system(key)
    return system_or_default(gpu_here(), loader)


def system_or_default(gpu: str | None, loader: Loader) -> SystemSpec:
    return loader.system(DEFAULT_SYSTEM) if gpu is None else system_of_gpu(gpu, loader)


def journal_to_resume(
    unfinished: tuple[Path, ...], *, resume: bool, what: str, gpu_name: str, root: Path
) -> Path | None:
    """The newest of the `unfinished`, which are oldest first, to go on with; None to start afresh.

    Raises BadInputError where there is nothing to resume.
    """
    if resume and not unfinished:
        raise BadInputError(f"--resume: no unfinished {what} of {gpu_name} in {root}; leave it off")
    if resume:
        return unfinished[-1]
    if unfinished:
        typer.echo(f"{unfinished[-1]} was not finished: --resume would go on with it", err=True)
    return None
