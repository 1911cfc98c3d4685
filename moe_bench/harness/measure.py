"""From a plan to a record: run it, and put what was measured beside where and with what it was measured."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.session import Outcome, run
from moe_bench.harness.trainer import StepReport
from moe_bench.results.provenance import (
    cpu_model,
    git_state,
    installed_packages,
    job_id_here,
    operating_system,
    recorded_environment,
)
from moe_bench.results.record import Provenance, Record
from moe_bench.spec.profile import Profile
from moe_bench.spec.rendezvous import Rendezvous
from moe_bench.spec.scale import Plan


def measure(
    plan: Plan,
    *,
    rendezvous: Rendezvous | None,
    environment: Mapping[str, str],
    command: tuple[str, ...],
    source_root: Path,
    on_step: Callable[[int, int, float | None], None],
    repeat: int = 0,
    profile: Profile | None = None,
) -> Record | None:
    """Run `plan` and return its record; None on every rank but the one that reports.

    `on_step` is called after each step with its number from 1, the number of all steps, and the loss if the
    rank has one;
    `repeat` says which of several equal runs this is; with a `profile` more steps run under it afterwards.
    Raises MeasurementError where the run gave no valid number, MissingRequirementError where something is
    not here.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")

    def seen(report: StepReport) -> None:
        on_step(report.step, report.num_steps, report.loss)

    outcome = run(
        megatron_arguments(plan.recipe),
        rendezvous=rendezvous,
        on_report=seen,
        slice_rank=plan.rank if plan.is_slice else None,
        profile=profile,
    )
    if outcome is None:
        return None
    return Record(
        plan=plan,
        provenance=_provenance(
            plan,
            outcome,
            started_at=started_at,
            environment=environment,
            command=command,
            source_root=source_root,
            repeat=repeat,
        ),
        samples=outcome.samples,
    )


def _provenance(
    plan: Plan,
    outcome: Outcome,
    *,
    started_at: str,
    environment: Mapping[str, str],
    command: tuple[str, ...],
    source_root: Path,
    repeat: int,
) -> Provenance:
    return Provenance(
        started_at=started_at,
        command=command,
        job_id=job_id_here(environment),
        repeat=repeat,
        git=git_state(source_root),
        python_version=platform.python_version(),
        packages=installed_packages(),
        hosts=outcome.hosts,
        cpu_model=cpu_model(),
        os=operating_system(),
        container=environment.get("MOE_BENCH_CONTAINER", plan.recipe.container),
        gpus=outcome.gpus,
        topology=outcome.topology,
        nccl_version=outcome.nccl_version,
        cuda_version=outcome.cuda_version,
        environment=recorded_environment(environment),
        traces=outcome.traces,
    )
