"""Trains two settings of a recipe on the same data, and the first again from weights a rounding off."""

from __future__ import annotations

import platform
import socket
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.data.build import read_manifest
from moe_bench.harness.training.program import Nudge, Start
from moe_bench.harness.training.session import train
from moe_bench.results.parity import Learned, Parity, ParitySide
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
from moe_bench.spec.recipe import Steps
from moe_bench.spec.training import TrainingJob


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityCase:
    """What is compared with what."""

    base: TrainingJob
    variant: TrainingJob
    varied: tuple[str, ...]
    """What the variant changes of the base, as `key=value`."""
    num_repeats: int


class Trained:
    """What bases have learned that were trained before: recipes of one model share their plain settings."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, Nudge | None], Learned] = {}

    def learned(self, job: TrainingJob, *, nudge: Nudge | None, on_run: Callable[[], None]) -> Learned:
        """Of `job`, trained now, after `on_run`, if it was not before: without a GPU nothing changes."""
        plan = job.plan.model_copy(update={"substitutions": (), "modified": (), "asked": "any"})
        recipe = plan.recipe.model_copy(update={"variant": "", "steps": Steps(), "env": {}})
        key = job.model_copy(update={"plan": plan.model_copy(update={"recipe": recipe})}).model_dump_json()
        if (key, nudge) not in self._runs:
            on_run()
            self._runs[key, nudge] = _learned(job, nudge=nudge)
        return self._runs[key, nudge]


def compare_losses(
    case: ParityCase,
    *,
    environment: Mapping[str, str],
    command: tuple[str, ...],
    source_root: Path,
    on_run: Callable[[str], None],
    trained: Trained,
) -> Parity:
    """Train base, variant and repeats, one after the other; `on_run` is told which before each.

    A base that `trained` has seen is not trained again.

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
    base_learned = trained.learned(base, nudge=None, on_run=partial(on_run, "base"))
    on_run("variant")
    variant_learned = _learned(variant, nudge=None)
    repeats = []
    for seed in range(case.num_repeats):
        name = f"base, nudged ({seed + 1} of {case.num_repeats})"
        nudge = Nudge(fraction=fraction, seed=seed)
        repeats.append(trained.learned(base, nudge=nudge, on_run=partial(on_run, name)))
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
        base=ParitySide(plan=base.plan, learned=base_learned),
        variant=ParitySide(plan=variant.plan, learned=variant_learned),
        nudge_fraction=fraction,
        repeats=tuple(repeats),
    )


def _learned(job: TrainingJob, *, nudge: Nudge | None) -> Learned:
    """Of every step; the run's own folder is gone afterwards."""
    lines: list[LogLine] = []

    def ignored(line: HealthLine) -> None:
        """Experts are `train`'s concern."""

    with tempfile.TemporaryDirectory(prefix="moe_bench-parity-") as folder:
        start = Start(checkpoint=None, nudge=nudge, saves_checkpoints=False)
        train(job, Path(folder), start, rendezvous=None, on_line=lines.append, on_health=ignored)
    norms = tuple(line.grad_norm for line in lines if line.grad_norm is not None)
    return Learned(losses=tuple(line.loss for line in lines), grad_norms=norms)
