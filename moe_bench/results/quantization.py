"""What a quantisation found: how far the model moved, what it weighs, and what was left as it was."""

from __future__ import annotations

import math

from moe_bench.spec.base import NonNegativeInt, PositiveInt, Spec, Text
from moe_bench.spec.recipe import Arithmetic, QuantFormat


class PartSize(Spec):
    """The weights of alike modules, layer numbers and expert numbers left out of their name."""

    name: Text
    """Such as `decoder.layers.*.mlp.experts.linear_fc1`."""
    num_modules: PositiveInt
    """Every expert of a stack is one."""
    num_params: NonNegativeInt
    num_bytes: NonNegativeInt
    """Of the format's values and scales, or of the original type where it was left out. Where weights are
    packed, of the tensors that hold them.
    """
    original_bytes: NonNegativeInt
    left_out_because: str | None
    """None where it was quantised."""


class Quantization(Spec):
    """One format on one model. Losses and divergence are in nats per token."""

    format: QuantFormat
    original_dtype: Text
    simulated_by: Text
    """What rounded the values."""
    arithmetic: Arithmetic
    """How the quantised model multiplied."""
    kernels: Text | None
    """What its 8-bit products ran on; None where there were none."""
    kl_from_simulated: float | None
    """Mean KL(p || q) over tokens: p of the simulation, q of the quantised model; None where it is one."""
    num_ranks: PositiveInt
    num_tokens: PositiveInt
    """Tokens of the evaluation."""
    loss: float
    """Mean cross-entropy of the model as it was."""
    quantized_loss: float
    kl_divergence: float
    """Mean of KL(p || q) over tokens: p of the model as it was, q of the quantised one."""
    same_choice_fraction: float
    """Tokens for which both models hold the same next token likeliest."""
    parts: tuple[PartSize, ...]

    @property
    def perplexity(self) -> float:
        """Of the model as it was."""
        return math.exp(self.loss)

    @property
    def quantized_perplexity(self) -> float:
        """Of the quantised model on the same tokens."""
        return math.exp(self.quantized_loss)

    @property
    def num_bytes(self) -> int:
        """All weights, those left out included."""
        return sum(part.num_bytes for part in self.parts)

    @property
    def original_bytes(self) -> int:
        """All weights as they were."""
        return sum(part.original_bytes for part in self.parts)
