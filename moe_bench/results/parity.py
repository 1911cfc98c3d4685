"""Evidence that two settings of a recipe learn alike: losses step by step, and what rounding does to them.

A file holds one comparison, `results/parity/<model>/<recipe>/<start>-<commit>-<job>.json`: raw losses.
Tolerances and the verdict are computed on read.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field

from moe_bench.analysis.loss_parity import MIN_REPEATS, first_difference, loss_tolerances
from moe_bench.results.journal import file_stem
from moe_bench.results.store import PARITY_FOLDER, write_once
from moe_bench.results.verification import VerificationProvenance
from moe_bench.results.versioned import read_versioned
from moe_bench.spec.base import NonNegativeFloat, PositiveFloat, PositiveInt, Spec, Text
from moe_bench.spec.scale import Plan

SCHEMA_VERSION = 1


class ParitySide(Spec):
    """One of the two settings."""

    plan: Plan
    losses: tuple[NonNegativeFloat, ...] = Field(min_length=1)
    """Of each step: mean over the global batch, in nats per token."""


class Parity(Spec):
    """Two settings of one recipe on the same data, from the same weights."""

    schema_version: Literal[1] = 1
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
    repeats: tuple[tuple[NonNegativeFloat, ...], ...] = Field(min_length=MIN_REPEATS)
    """Losses of the base, each time from weights nudged anew."""

    @cached_property
    def tolerances(self) -> tuple[float, ...]:
        """By how much the variant's loss may be off at each step, in nats."""
        return loss_tolerances(self.base.losses, self.repeats)

    @property
    def first_different_step(self) -> int | None:
        """Counted from 1; None where all losses are within their tolerances."""
        index = first_difference(self.base.losses, self.variant.losses, self.tolerances)
        return None if index is None else index + 1

    @property
    def is_equal(self) -> bool:
        """Whether rounding alone explains how the two differ."""
        return self.first_different_step is None

    def covers(self, plan: Plan) -> bool:
        """Whether `plan` is one of the two settings, at whatever scale."""
        sides = (self.base.plan, self.variant.plan)
        return any(plan.asked == side.asked and set(plan.modified) == set(side.modified) for side in sides)


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
    paths = [path for key in models for path in (root / PARITY_FOLDER / key).glob("*/[!.]*.json")]
    return tuple(map(read_parity, sorted(paths, key=lambda path: path.name, reverse=True)))


def latest_parity(parities: Iterable[Parity], plan: Plan) -> Parity | None:
    """The first of `parities`, newest first, of which `plan` is a side; None where there is none."""
    return next((parity for parity in parities if parity.covers(plan)), None)
