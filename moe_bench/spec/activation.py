"""The activation inside MLPs and experts."""

from __future__ import annotations

from typing import Literal

from moe_bench.spec.base import PositiveFloat, Spec


class Activation(Spec):
    """The activation between the projections of an MLP or expert."""

    kind: Literal["swiglu", "clamped_swiglu", "geglu", "gelu", "squared_relu"]
    """`clamped_swiglu` (GPT-OSS): x * sigmoid(1.702 x) times the linear part plus an offset, clamped. `gelu`
    (GPT-2's, x Phi(x) by its tanh approximation, arXiv:1606.08415, 2) and `squared_relu` (Nemotron) have no
    gate, so an MLP has two matrices instead of three.
    """
    clamp_limit: PositiveFloat | None = None
    linear_offset: float = 0.0

    @property
    def is_gated(self) -> bool:
        """Whether one half of the first projection multiplies the other."""
        return self.kind not in ("gelu", "squared_relu")
