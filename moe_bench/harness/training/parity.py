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

from moe_bench.harness import device_facts
from moe_bench.harness.data.build import read_manifest
from moe_bench.harness.training.program import Start
from moe_bench.harness.training.session import train
from moe_bench.results.parity import ComparedRanks, Learned, Parity, ParitySide
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
from moe_bench.spec.derive_parity import nudge_fraction, require_comparable
from moe_bench.spec.recipe import Steps
from moe_bench.spec.rendezvous import Rendezvous
from moe_bench.spec.training import ComparedRun, Nudge, TrainingJob


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityCase:
    """What is compared with what."""

    base: TrainingJob
    variant: TrainingJob
    varied: tuple[str, ...]
    """What the variant changes of the base, as `key=value`."""
    num_repeats: int


Learn = Callable[[ComparedRun], ComparedRanks]
"""Starts the ranks of a run and waits for what they leave."""


class Trained:
    """What bases have learned that were trained before: recipes of one model share their plain settings."""

    def __init__(self) -> None:
        self._runs: dict[tuple[str, Nudge | None], ComparedRanks] = {}

    def of(self, run: ComparedRun, learn: Learn, *, on_run: Callable[[], None]) -> ComparedRanks:
        """Of `run`, trained now, after `on_run`, if it was not before: its name and its `env` change nothing.

        On GPUs a second time would differ by what the repeats show, too.
        """
        plan = run.job.plan.model_copy(update={"substitutions": (), "modified": (), "asked": "any"})
        recipe = plan.recipe.model_copy(update={"variant": "", "steps": Steps(), "env": {}})
        job = run.job.model_copy(update={"plan": plan.model_copy(update={"recipe": recipe})})
        key = job.model_dump_json()
        if (key, run.nudge) not in self._runs:
            on_run()
            self._runs[key, run.nudge] = learn(run)
        return self._runs[key, run.nudge]


def compare_losses(
    case: ParityCase,
    *,
    environment: Mapping[str, str],
    command: tuple[str, ...],
    source_root: Path,
    on_run: Callable[[str], None],
    learn: Learn,
    trained: Trained,
) -> Parity:
    """Train base, variant and repeats, one after the other; `on_run` is told which before each.

    A base that `trained` has seen is not trained again. Raises BadInputError for a router that sees later
    tokens and for weights that no layout can begin with alike, and what `learn` raises.
    """
    base, variant = case.base, case.variant
    for job in (base, variant):
        require_comparable(job.plan)
    fraction = nudge_fraction(base.plan.recipe, variant.plan.recipe)
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    of_base = trained.of(ComparedRun(job=base), learn, on_run=partial(on_run, "base"))
    on_run("variant")
    of_variant = learn(ComparedRun(job=variant))
    repeats = []
    for seed in range(case.num_repeats):
        name = f"base, nudged ({seed + 1} of {case.num_repeats})"
        nudged = ComparedRun(job=base, nudge=Nudge(roundoff_fraction=fraction, seed=seed))
        repeats.append(trained.of(nudged, learn, on_run=partial(on_run, name)).learned)
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
        base=ParitySide(plan=base.plan, **dict(of_base)),
        variant=ParitySide(plan=variant.plan, **dict(of_variant)),
        nudge_fraction=fraction,
        repeats=tuple(repeats),
    )


def learn_here(run: ComparedRun) -> ComparedRanks:
    """The same in ranks that are forked here, without a GPU; the run's own folder is gone afterwards.

    This process must have one thread and must have run no tensor operation.
    """
    with tempfile.TemporaryDirectory(prefix="moe_bench-parity-") as folder:
        found = learn_as_rank(run, Path(folder), None)
    if found is None:
        raise RuntimeError("no rank said a loss")
    return found


def learn_as_rank(run: ComparedRun, folder: Path, rendezvous: Rendezvous | None) -> ComparedRanks | None:
    """What the run leaves, on the rank that knows its losses; None on all others. `folder` is of all ranks.

    Without a `rendezvous` the ranks are forked from this process.
    """
    lines: list[LogLine] = []

    def ignored(line: HealthLine) -> None:
        """Experts are `train`'s concern."""

    start = Start(checkpoint=None, weights_by_name=True, nudge=run.nudge, saves_checkpoints=False)
    train(run.job, folder, start, rendezvous=rendezvous, on_line=lines.append, on_health=ignored)
    if not lines:
        return None
    norms = tuple(line.grad_norm for line in lines if line.grad_norm is not None)
    has_gpu = run.job.plan.recipe.system.gpu is not None
    return ComparedRanks(
        learned=Learned(losses=tuple(line.loss for line in lines), grad_norms=norms),
        gpu=device_facts.gpu_facts() if has_gpu else None,
        nccl_version=device_facts.nccl_version() if has_gpu else None,
    )
