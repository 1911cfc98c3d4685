"""Trains two settings of a recipe on the same data, and the first again from weights a rounding off."""

from __future__ import annotations

import platform
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.data.build import read_manifest
from moe_bench.harness.training.program import Nudge, Start
from moe_bench.harness.training.session import train
from moe_bench.results.parity import Parity, ParitySide
from moe_bench.results.provenance import (
    cpu_model,
    git_state,
    installed_packages,
    job_id_here,
    operating_system,
)
from moe_bench.results.training_health import HealthLine
from moe_bench.results.training_log import LogLine
from moe_bench.results.verification import VerificationProvenance
from moe_bench.spec.derive_parity import nudge_fraction, require_causal
from moe_bench.spec.training import TrainingJob


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityCase:
    """What is compared with what."""

    base: TrainingJob
    variant: TrainingJob
    varied: tuple[str, ...]
    """What the variant changes of the base, as `key=value`."""
    num_repeats: int


def compare_losses(
    case: ParityCase,
    *,
    environment: Mapping[str, str],
    command: tuple[str, ...],
    source_root: Path,
    on_run: Callable[[str], None],
) -> Parity:
    """Train base, variant and repeats, one after the other; `on_run` is told which before each.

    The caller must have one thread and must have run no tensor operation. Raises BadInputError for a router
    that sees later tokens, MissingRequirementError for recipes on GPUs.
    """
    base, variant = case.base, case.variant
    for job in (base, variant):
        require_causal(job.plan.recipe)
        if job.plan.recipe.system.gpu is not None:
            raise MissingRequirementError(
                f"{job.plan.asked}: parity trains its runs one after the other in processes forked here, "
                "which GPU ranks cannot be; compare toys with --scale smoke"
            )
    fraction = nudge_fraction(base.plan.recipe, variant.plan.recipe)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    on_run("base")
    base_losses = _losses(base, Start(checkpoint=None))
    on_run("variant")
    variant_losses = _losses(variant, Start(checkpoint=None))
    repeats = []
    for seed in range(case.num_repeats):
        on_run(f"base, nudged ({seed + 1} of {case.num_repeats})")
        repeats.append(_losses(base, Start(checkpoint=None, nudge=Nudge(fraction=fraction, seed=seed))))
    return Parity(
        provenance=VerificationProvenance(
            started_at=started_at,
            command=command,
            job_id=job_id_here(environment),
            git=git_state(source_root),
            python_version=platform.python_version(),
            packages=installed_packages(),
            host=socket.gethostname(),
            cpu_model=cpu_model(),
            os=operating_system(),
        ),
        data=Path(base.data).name,
        num_data_tokens=read_manifest(Path(base.data)).num_tokens,
        varied=case.varied,
        base=ParitySide(plan=base.plan, losses=base_losses),
        variant=ParitySide(plan=variant.plan, losses=variant_losses),
        nudge_fraction=fraction,
        repeats=tuple(repeats),
    )


def _losses(job: TrainingJob, start: Start) -> tuple[float, ...]:
    """Of every step; the run's own folder is gone afterwards."""
    lines: list[LogLine] = []

    def ignored(line: HealthLine) -> None:
        """Experts are `train`'s concern."""

    with tempfile.TemporaryDirectory(prefix="moe_bench-parity-") as folder:
        train(job, Path(folder), start, rendezvous=None, on_line=lines.append, on_health=ignored)
    return tuple(line.loss for line in lines)
