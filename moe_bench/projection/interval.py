"""How far a projected step time may be off: half-widths from rows that its constants had not seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_bench.projection.evidence import Grade
from moe_bench.projection.rates import gpu_rates
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


# These four come from `accuracy --cross-validate` over results/published and are tested against it; after a
# change of the model, run `python benchmarks/interval_widths.py` and copy what it prints.
DENSE = HalfWidths(p50_fraction=0.09, p90_fraction=0.31)
MOE = HalfWidths(p50_fraction=0.09, p90_fraction=0.31)
"""With the family of the row's model left out of the fit."""
DENSE_ON_UNKNOWN_GPU = HalfWidths(p50_fraction=0.15, p90_fraction=0.38)
MOE_ON_UNKNOWN_GPU = HalfWidths(p50_fraction=0.15, p90_fraction=0.38)
"""With the row's GPU left out, which is wider: for GPUs whose rates are scaled from another one's."""


def half_widths(log_ratios: Sequence[float]) -> HalfWidths:
    """The quantiles of |ln(projected / published)|; there must be one row at least."""
    p50, p90 = np.quantile(np.abs(np.array(log_ratios)), LEVELS)
    return HalfWidths(p50_fraction=float(p50), p90_fraction=float(p90))


def interval(recipe: Recipe, step_s: float) -> Interval:
    """`step_s` e^-h to `step_s` e^h, symmetric in the logarithm; h by kind of model and evidence."""
    is_prior = rates_are_prior(recipe)
    if recipe.model.moe is None:
        widths, kind = (DENSE_ON_UNKNOWN_GPU if is_prior else DENSE), "dense"
    else:
        widths, kind = (MOE_ON_UNKNOWN_GPU if is_prior else MOE), "MoE"
    left_out = "GPU" if is_prior else "model family"
    return Interval(
        p50=_around(step_s, widths.p50_fraction),
        p90=_around(step_s, widths.p90_fraction),
        basis=f"errors on published {kind} rows whose {left_out} was left out of the fit",
    )


def rates_are_prior(recipe: Recipe) -> bool:
    """Whether the rates of the recipe's GPU are those of another one, scaled by the datasheets' peaks."""
    gpu = recipe.system.gpu
    return gpu is not None and gpu_rates(gpu).grade is Grade.PRIOR


def _around(step_s: float, half_width: float) -> Bounds:
    return Bounds(low_s=step_s * math.exp(-half_width), high_s=step_s * math.exp(half_width))
