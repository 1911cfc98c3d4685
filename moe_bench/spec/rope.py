"""Rotary positions, and how they are stretched beyond the length that a model was trained on."""

from __future__ import annotations

from moe_bench.spec.base import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Spec


class YarnScaling(Spec):
    """YaRN's stretching of the rotary frequencies (arXiv:2309.00071)."""

    factor: PositiveFloat
    original_max_position_embeddings: PositiveInt
    beta_fast: PositiveFloat = 32.0
    beta_slow: PositiveFloat = 1.0
    mscale_factor: NonNegativeFloat = 1.0
    mscale_all_dim_factor: NonNegativeFloat = 0.0
    round_correction_range: bool = True
    """Whether the borders of the corrected dimensions are rounded to whole ones (`truncate` in GPT-OSS)."""


class Rope(Spec):
    """Rotary position embedding (arXiv:2104.09864)."""

    rope_theta: PositiveFloat
    rotary_fraction: Fraction = 1.0
    """Share of each head's dimensions that rotates; GLM-4.5 rotates half, Nemotron none."""
    interleaved: bool = False
    """Whether neighbouring dimensions form the rotating pairs (DeepSeek's layout) or the two halves do."""
    scaling: YarnScaling | None = None
