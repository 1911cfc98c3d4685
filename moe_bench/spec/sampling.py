"""How the next token of a text is chosen from a model's probabilities."""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from moe_bench.spec.base import NonNegativeFloat, NonNegativeInt, PositiveInt, Spec


class Sampling(Spec):
    """The most likely token, or one drawn from softmax(logits / temperature) over the `top_k` likeliest."""

    temperature: NonNegativeFloat = 0.0
    """0 takes the most likely one."""
    top_k: PositiveInt | None = None
    """None draws from all."""
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _require_draws(self) -> Self:
        if self.top_k is not None and self.temperature == 0:
            raise ValueError("top_k: the most likely token is taken at temperature 0; give a temperature")
        return self
