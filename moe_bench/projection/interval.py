"""How far a projected step time may be off: half-widths from rows that its constants had not seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.evidence.rates import gpu_rates
from moe_bench.spec.recipe import Recipe

LEVELS = (0.5, 0.9)
"""Shares of published rows that the two intervals hold."""
DECIDING_FIELDS = frozenset(
    {
        "cuda_graphs",
        "dispatch.dispatcher",
        "global_batch_size",
        "micro_batch_size",
        "offload",
        "overlap.expert_parallel",
        "parallel.expert_tensor",
        "parallel.virtual_pipeline",
        "recompute",
        "routing.mode",
        "token_drop",
    }
)
"""Fields of a recipe that change its step by more than a few per cent, and that rows often do not print."""
NUM_INFERRED = 6
"""Deciding fields that a rule may fill before the wider of the two intervals of an MoE row widens. Errors on
dense rows do not grow with their number."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HalfWidths:
    """Bounds of |ln(projected / published step time)| that half and nine in ten left-out rows keep."""

    p50_fraction: float
    p90_fraction: float

    def widened(self, other: HalfWidths) -> HalfWidths:
        """With an error beside it that is independent of it."""
        return HalfWidths(
            p50_fraction=math.hypot(self.p50_fraction, other.p50_fraction),
            p90_fraction=math.hypot(self.p90_fraction, other.p90_fraction),
        )


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


# they come from the cross-validation over results/published and are tested against it; after a change of
# rows, rules, rates or constants run `python benchmarks/accuracy_table.py --write`
DENSE = HalfWidths(p50_fraction=0.038, p90_fraction=0.106)
MOE = HalfWidths(p50_fraction=0.055, p90_fraction=0.185)
MOE_INFERRED = HalfWidths(p50_fraction=0.076, p90_fraction=0.198)
"""With the family of the row's model left out of the fit. `MOE` is of rows of which no more than
NUM_INFERRED deciding fields are inferred, as none are of a recipe; `MOE_INFERRED` of the others."""
SCALED_RATES = HalfWidths(p50_fraction=0.045, p90_fraction=0.11)
"""What rates scaled from another GPU add: the BF16 limit of a GB300 over its datasheet's is e^0.11 times that
of a B200, the largest such difference inside an architecture (evidence/rates.py); P50 as if normal."""
SPARSE_ATTENTION = HalfWidths(p50_fraction=0.15, p90_fraction=0.32)
"""What attention to chosen keys adds, whose rates are priors (evidence/sparse_rates.py): the median and the
largest error of the first projection of DeepSeek-V4's seven published rows, before anything was changed."""


def half_widths(log_ratios: Sequence[float]) -> HalfWidths:
    """The quantiles of |ln(projected / published)|; there must be one row at least."""
    p50, p90 = np.quantile(np.abs(np.array(log_ratios)), LEVELS)
    return HalfWidths(p50_fraction=float(p50), p90_fraction=float(p90))


def num_deciding(inferred_fields: Iterable[str]) -> int:
    """How many of `inferred_fields`, dotted names in `Recipe`, are deciding ones."""
    return len(DECIDING_FIELDS.intersection(inferred_fields))


def interval(recipe: Recipe, step_s: float, *, inferred_fields: Iterable[str] = ()) -> Interval:
    """`step_s` e^-h to `step_s` e^h, symmetric in the logarithm; h by kind of model, and by how much of an
    MoE recipe is inferred, as `inferred_fields` names it.

    Where the rates of the GPU are only a prior, h = hypot(h, SCALED_RATES), and so for SPARSE_ATTENTION: the
    errors are independent.
    """
    widths, rows = MOE, "MoE rows that print as much"
    if recipe.model.moe is None:
        widths, rows = DENSE, "dense rows"
    elif num_deciding(inferred_fields) > NUM_INFERRED:
        widths, rows = MOE_INFERRED, "MoE rows that print as little"
    basis = f"errors on published {rows}, their model family left out of the fit"
    if rates_are_prior(recipe):
        widths = widths.widened(SCALED_RATES)
        basis += ", widened for rates scaled from another GPU"
    if has_sparse_attention(recipe):
        widths = widths.widened(SPARSE_ATTENTION)
        basis += ", widened for rates of sparse attention that are priors"
    return Interval(
        p50=_around(step_s, widths.p50_fraction), p90=_around(step_s, widths.p90_fraction), basis=basis
    )


def rates_are_prior(recipe: Recipe) -> bool:
    """Whether the rates of the recipe's GPU are those of another one, scaled by the datasheets' peaks."""
    gpu = recipe.system.gpu
    return gpu is not None and gpu_rates(gpu).grade is Grade.PRIOR


def has_sparse_attention(recipe: Recipe) -> bool:
    """Whether queries see chosen or compressed keys, whose kernels nobody timed in training."""
    attention = recipe.model.attention
    is_latent = attention.kind == "mla" and attention.sparse is not None
    return is_latent or recipe.model.compressed_attention is not None


def _around(step_s: float, half_width: float) -> Bounds:
    return Bounds(low_s=step_s * math.exp(-half_width), high_s=step_s * math.exp(half_width))
