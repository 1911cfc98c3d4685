"""What may be compared on its loss, and by how much a rounding moves a weight."""

from __future__ import annotations

from types import MappingProxyType

from moe_bench.errors import BadInputError
from moe_bench.spec.recipe import Precision, Recipe

ROUNDOFF_FRACTIONS: MappingProxyType[Precision, float] = MappingProxyType(
    {
        "fp32": 2.0**-24,
        "bf16": 2.0**-8,
        "fp8_delayed": 2.0**-4,
        "fp8_tensorwise": 2.0**-4,
        "fp8_blockwise": 2.0**-4,
        "fp8_rowwise": 2.0**-4,
        "mxfp8": 2.0**-4,
        "nvfp4": 2.0**-2,
    }
)
"""Unit roundoff 2^-p of the format that matrix products take: p = 24 bits of significand in FP32, 8 in BF16,
4 in E4M3 (arXiv:2209.05433), 2 in E2M1 (OCP Microscaling Formats 1.0)."""


def nudge_fraction(base: Recipe, variant: Recipe) -> float:
    """One rounding of the coarser of the two precisions."""
    return max(ROUNDOFF_FRACTIONS[base.precision], ROUNDOFF_FRACTIONS[variant.precision])


def require_causal(recipe: Recipe) -> None:
    """Raise BadInputError where a token's experts depend on later tokens.

    Such a router sees what the model is to predict (arXiv:2202.09368, section 7), and what it sees is a
    rank's micro batch, so that another layout is another model.
    """
    moe = recipe.model.moe
    if moe is not None and not moe.router.is_causal:
        raise BadInputError(
            f"{recipe.name}: a {moe.router.choice} router sees later tokens of a rank's micro batch, so its "
            "loss is not that of predicting them, and no two layouts have the same; compare a top_k router"
        )
