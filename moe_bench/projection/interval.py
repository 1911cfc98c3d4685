"""How far a projected step time may be off: half-widths from rows that its constants had not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.evidence.rates import gpu_rates
from moe_bench.spec.recipe import Recipe

LEVELS = (0.5, 0.9)
"""Shares of published rows that the two intervals hold."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfWidths:
    """Bounds of |ln(projected / published step time)| that half and nine in ten left-out rows keep."""

    p50_fraction: float
    p90_fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """A step time between two ends."""

    low_s: float
    high_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """Where the measured step time is expected, were the recipe run."""

    p50: Bounds
    """Holds as often as not."""
    p90: Bounds
    """Holds nine times in ten."""
    basis: str
    """Which rows its width comes from."""


# both come from the cross-validation over results/published and are tested against it; after a change of
# rows, rules, rates or constants run `python benchmarks/accuracy_table.py --write`
DENSE = HalfWidths(p50_fraction=0.063, p90_fraction=0.163)
MOE = HalfWidths(p50_fraction=0.087, p90_fraction=0.262)
"""With the family of the row's model left out of the fit."""
SCALED_RATES = HalfWidths(p50_fraction=0.045, p90_fraction=0.11)
"""What rates scaled from another GPU add: the BF16 limit of a GB300 over its datasheet's is e^0.11 times that
of a B200, the largest such difference inside an architecture (evidence/rates.py); P50 as if normal."""


def half_widths(log_ratios: Sequence[float]) -> HalfWidths:
    """The quantiles of |ln(projected / published)|; there must be one row at least."""
    p50, p90 = np.quantile(np.abs(np.array(log_ratios)), LEVELS)
    return HalfWidths(p50_fraction=float(p50), p90_fraction=float(p90))


def interval(recipe: Recipe, step_s: float) -> Interval:
    """`step_s` e^-h to `step_s` e^h, symmetric in the logarithm; h by kind of model.

    Where the rates of the GPU are only a prior, h = hypot(h, SCALED_RATES): the two errors are independent.
    """
    widths, kind = (DENSE, "dense") if recipe.model.moe is None else (MOE, "MoE")
    basis = f"errors on published {kind} rows whose model family was left out of the fit"
    if rates_are_prior(recipe):
        widths = HalfWidths(
            p50_fraction=math.hypot(widths.p50_fraction, SCALED_RATES.p50_fraction),
            p90_fraction=math.hypot(widths.p90_fraction, SCALED_RATES.p90_fraction),
        )
        basis += ", widened for rates scaled from another GPU"
    return Interval(
        p50=_around(step_s, widths.p50_fraction), p90=_around(step_s, widths.p90_fraction), basis=basis
    )


def rates_are_prior(recipe: Recipe) -> bool:
    """Whether the rates of the recipe's GPU are those of another one, scaled by the datasheets' peaks."""
    gpu = recipe.system.gpu
    return gpu is not None and gpu_rates(gpu).grade is Grade.PRIOR


def _around(step_s: float, half_width: float) -> Bounds:
    return Bounds(low_s=step_s * math.exp(-half_width), high_s=step_s * math.exp(half_width))
