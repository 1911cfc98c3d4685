"""Runs the proof of a recipe's model in forked ranks, layout by layout, and puts together what they found."""

from __future__ import annotations

import math
import platform
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from moe_bench.checkpoints.family import family_of
from moe_bench.checkpoints.rule import Rule
from moe_bench.errors import MeasurementError
from moe_bench.harness.convert.parity import ParityCase, RankParity, parity_rank
from moe_bench.harness.workers import run_forked
from moe_bench.results.provenance import (
    cpu_model,
    git_state,
    installed_packages,
    job_id_here,
    operating_system,
)
from moe_bench.results.verification import (
    LayoutProof,
    TensorError,
    Verification,
    VerificationProvenance,
)
from moe_bench.spec.derive_verify import LAYOUTS, VerifyLayout, verify_recipe, verify_substitutions
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.system import SystemSpec


def verify(
    recipe: Recipe,
    *,
    host: SystemSpec,
    environment: Mapping[str, str],
    command: tuple[str, ...],
    source_root: Path,
    on_layout: Callable[[VerifyLayout], None],
) -> Verification:
    """Compare one step of the recipe's model with Hugging Face's under every layout of `LAYOUTS`.

    `on_layout` is called before each. The caller must have one thread and must have run no tensor operation.
    Raises BadInputError where the model has no map, or the map leaves out a tensor, which it names.
    """
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    toys = {layout: verify_recipe(recipe, host=host, layout=layout) for layout in LAYOUTS}
    proofs, departures = [], set()
    for layout, toy in toys.items():
        on_layout(layout)
        ranks = run_parity(ParityCase(recipe=toy, model=toy.model, rules=rules_of(toy)))
        proofs.append(layout_proof(layout, ranks))
        departures |= {departure for rank in ranks for departure in rank.departures}
    return Verification(
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
        asked=recipe.name,
        model=recipe.model,
        substitutions=verify_substitutions(recipe, toys["1 process"]),
        departures=tuple(sorted(departures)),
        proofs=tuple(proofs),
    )


def rules_of(toy: Recipe) -> tuple[Rule, ...]:
    """The map of the toy's model."""
    return tuple(family_of(toy.model).rules(toy.model, num_mtp_layers=toy.num_mtp_layers))


def run_parity(case: ParityCase) -> list[RankParity]:
    """What every rank of the case found."""
    num_ranks = case.recipe.parallel.num_gpus
    return run_forked(num_ranks, partial(parity_rank, case), on_progress=lambda content: None)


def layout_proof(layout: VerifyLayout, ranks: Sequence[RankParity]) -> LayoutProof:
    """The worst of all ranks, tensor by tensor; MeasurementError where one is not a number."""
    return LayoutProof(
        layout=layout,
        num_processes=len(ranks),
        logit_error_fraction=max(rank.logit_error_fraction for rank in ranks),
        outputs=_worst([rank.output_error_fractions for rank in ranks], layout),
        loss=ranks[0].loss,
        reference_loss=ranks[0].reference_loss,
        gradients=_worst([rank.gradient_error_fractions for rank in ranks], layout),
    )


def _worst(ranks: Sequence[Mapping[str, float]], layout: VerifyLayout) -> tuple[TensorError, ...]:
    worst: dict[str, float] = {}
    for name, error in (pair for rank in ranks for pair in rank.items()):
        if not math.isfinite(error):
            raise MeasurementError(f"{layout}: {name}: not finite on one side; look at its rule first")
        worst[name] = max(error, worst.get(name, 0.0))
    return tuple(TensorError(tensor=name, error_fraction=error) for name, error in worst.items())
