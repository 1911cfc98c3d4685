"""Evidence that two settings of a recipe learn alike: losses and gradient norms of both, step by step.

A file holds one comparison, `results/parity/<model>/<recipe>/<start>-<commit>-<job>.json`: raw values.
Tolerances and the verdict are computed on read.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from moe_bench.analysis.loss_parity import MIN_REPEATS, curve_tolerances, first_difference
from moe_bench.results.journal import file_stem
from moe_bench.results.record import GpuFacts
from moe_bench.results.store import PARITY_FOLDER, record_files, write_once
from moe_bench.results.verification import VerificationProvenance
from moe_bench.results.versioned import read_versioned
from moe_bench.spec.base import NonNegativeFloat, PositiveFloat, PositiveInt, Spec, Text
from moe_bench.spec.derive_parity import fp32_recipe, plain_recipe, settings_of_toy, toy_of, unseen_settings
from moe_bench.spec.scale import Plan

SCHEMA_VERSION = 2

Verdict = Literal["equal", "partly", "differs"]


class Learned(Spec):
    """What a run says of each of its steps."""

    losses: tuple[NonNegativeFloat, ...] = Field(min_length=1)
    """Mean over the global batch, in nats per token."""
    grad_norms: tuple[NonNegativeFloat, ...]
    """Over the whole model, before clipping; empty where nothing is clipped, and so nothing was computed.

    Adam takes a gradient that is wrong by a factor as it takes the right one; the norm shows it.
    """

    @model_validator(mode="after")
    def _has_all_steps(self) -> Self:
        if self.grad_norms and len(self.grad_norms) != len(self.losses):
            raise ValueError(f"{len(self.losses)} losses and {len(self.grad_norms)} gradient norms")
        return self


class ComparedRanks(Spec):
    """What the ranks of one run leave."""

    learned: Learned
    gpu: GpuFacts | None = None
    """Of the rank that knows the loss; None without a GPU, as is what follows."""
    nccl_version: Text | None = None


class ParitySide(ComparedRanks):
    """One of the two settings."""

    plan: Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One quantity of every step under both settings."""

    name: str
    """`loss`, in nats per token, or `gradient norm`."""
    base_values: tuple[float, ...]
    variant_values: tuple[float, ...]
    repeat_values: tuple[tuple[float, ...], ...]
    """Of the base, each time from weights nudged anew."""
    tolerance_values: tuple[float, ...]
    """By how much the variant may be off at each step."""

    @property
    def first_different_step(self) -> int | None:
        """Counted from 1; None where all values are within their tolerances."""
        index = first_difference(self.base_values, self.variant_values, self.tolerance_values)
        return None if index is None else index + 1


class Parity(Spec):
    """Two settings of one recipe on the same data, from the same weights."""

    schema_version: Literal[2] = 2
    provenance: VerificationProvenance
    data: Text
    """Name of the dataset, without its folder."""
    num_data_tokens: PositiveInt
    varied: tuple[Text, ...] = Field(min_length=1)
    """What the variant changes of the base, as `key=value`."""
    base: ParitySide
    variant: ParitySide
    nudge_fraction: PositiveFloat
    """By which every first weight of a repeat is off, up or down at random."""
    repeats: tuple[Learned, ...] = Field(min_length=MIN_REPEATS)
    """The base, each time from weights nudged anew."""

    @model_validator(mode="after")
    def _has_equal_lengths(self) -> Self:
        runs = (self.base.learned, self.variant.learned, *self.repeats)
        if len({(len(run.losses), len(run.grad_norms)) for run in runs}) > 1:
            raise ValueError("runs of different lengths")
        return self

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        """Losses, and gradient norms where there are any."""
        return tuple(
            self._curve(name) for name in ("loss", "gradient norm") if _values(self.base.learned, name)
        )

    def _curve(self, name: str) -> Curve:
        base, variant, *repeats = (
            _values(run, name) for run in (self.base.learned, self.variant.learned, *self.repeats)
        )
        return Curve(
            name=name,
            base_values=base,
            variant_values=variant,
            repeat_values=tuple(repeats),
            tolerance_values=curve_tolerances(base, repeats),
        )

    @property
    def first_different(self) -> Curve | None:
        """The curve that differs first, losses before gradient norms; None where rounding explains both."""
        different = [curve for curve in self.curves if curve.first_different_step is not None]
        return min(different, key=lambda curve: curve.first_different_step or 0, default=None)

    @property
    def is_equal(self) -> bool:
        """Whether rounding alone explains how the two differ."""
        return self.first_different is None

    @cached_property
    def settings(self) -> tuple[object, ...]:
        """What was compared (spec/derive_parity.py)."""
        return settings_of_toy(self.variant.plan.recipe)

    @cached_property
    def is_against_plain(self) -> bool:
        """Whether the base is the plain setting of the variant, as it is computed today."""
        plain = plain_recipe(self.variant.plan.recipe)
        return settings_of_toy(self.base.plan.recipe) == settings_of_toy(plain)


def _values(learned: Learned, name: str) -> tuple[float, ...]:
    return learned.losses if name == "loss" else learned.grad_norms


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What comparisons with the plain setting say of the settings of one plan."""

    comparisons: tuple[Parity, ...]
    """The newest in FP32, then in the precision of the plan's toy; one of them may be missing."""
    unseen: tuple[str, ...]
    """Settings of the plan that none of them ran, as `field=value`."""

    @property
    def precision_gaps(self) -> tuple[float, ...]:
        """How far the plain setting's losses in the own precision are from those in FP32, in nats, by step.

        Empty where not both were trained alike. No verdict: what rounding explains is not known across
        precisions (spec/derive_parity.py, plain_recipe).
        """
        if len(self.comparisons) != 2:
            return ()
        exact, own = self.comparisons
        runs = [(one.data, one.num_data_tokens, one.base.plan.recipe.seed) for one in (exact, own)]
        losses = [one.base.learned.losses for one in (exact, own)]
        if runs[0] != runs[1] or len(losses[0]) != len(losses[1]):
            return ()
        return tuple(other - one for one, other in zip(*losses, strict=True))

    @property
    def verdict(self) -> Verdict:
        """`equal` where everything that runs was compared, `partly` where some of it was."""
        if not all(parity.is_equal for parity in self.comparisons):
            return "differs"
        return "partly" if self.unseen else "equal"


def evidence_of(parities: Sequence[Parity], plan: Plan) -> Evidence | None:
    """What `parities`, newest first, say of `plan`; None where none is of its settings as they are today.

    Compared are toys (`toy_of`): a comparison speaks for every plan with the same toy, and for none after a
    change that its toy shows.
    """
    if not parities:
        return None
    toy = toy_of(plan)
    own, exact = settings_of_toy(toy), settings_of_toy(fp32_recipe(toy))
    found = [
        next((one for one in parities if one.settings == wanted and one.is_against_plain), None)
        for wanted in ((own,) if own == exact else (exact, own))
    ]
    comparisons = tuple(one for one in found if one is not None)
    if not comparisons:
        return None
    return Evidence(
        comparisons=comparisons,
        unseen=min((unseen_settings(plan, one.variant.plan.recipe) for one in comparisons), key=len),
    )


def write_parity(root: Path, parity: Parity) -> Path:
    """Write it to a new file of its own and return the path."""
    where = parity.provenance
    stem = file_stem(started_at=where.started_at, commit=where.git.short_name, job_id=where.job_id)
    return write_once(root / PARITY_FOLDER / parity.base.plan.asked / f"{stem}.json", parity)


def read_parity(path: Path) -> Parity:
    """The comparison in `path`; RecordError names the file, the field and what is wrong with it."""
    return read_versioned(path, Parity, what="parity file", version=SCHEMA_VERSION)


def read_parities(root: Path, *, models: Iterable[str]) -> tuple[Parity, ...]:
    """All comparisons of `models`, which are keys, below the folder of results `root`, newest first."""
    folders = (root / PARITY_FOLDER / key for key in models)
    files = [file for folder in folders if folder.is_dir() for file in record_files(str(folder))]
    newest_first = sorted(files, key=lambda file: file.name, reverse=True)
    return tuple(read_parity(Path(file.path)) for file in newest_first)
