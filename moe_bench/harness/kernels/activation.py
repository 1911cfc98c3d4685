"""The experts' activation weighted by the router's probabilities, and its gradient written by hand.

    gate, linear = halves of x, clamped: min(gate, c) and clip(linear, -c, c) where a clamp c is given
    y = gate * sigmoid(alpha * gate) * (linear + offset) * probability

alpha 1, offset 0, no clamp is SwiGLU (arXiv:2002.05202); alpha 1.702, offset 1, clamp 7 is GPT-OSS's. GELU
has no gate: y = x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) * probability (arXiv:1606.08415, 2). The
backward pass reads x, the probabilities and the output's gradient, so nothing in between has to be kept.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.compiled import compiled

QUICK_GELU_ALPHA = 1.702
"""Megatron-Core's quick_gelu, fusions/fused_bias_geglu.py (arXiv:1606.08415 rounds the same constant)."""

_GELU_SCALE = math.sqrt(2 / math.pi)
_GELU_CUBIC = 0.044715


@dataclass(frozen=True, slots=True, kw_only=True)
class GatedActivation:
    """The three numbers that tell the gated activations apart."""

    alpha: float
    offset: float = 0.0
    clamp: float | None = None

    def forward(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """Activate x [tokens, 2 * ffn] with probabilities [tokens]: [tokens, ffn] of x's type."""
        function = compiled(gated_forward) if x.is_cuda else gated_forward
        return function(x, probabilities, self.alpha, self.offset, self.clamp)

    def backward(self, grad: Tensor, x: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the probabilities, from the gradient of the output [tokens, ffn]."""
        function = compiled(gated_backward) if x.is_cuda else gated_backward
        return function(grad, x, probabilities, self.alpha, self.offset, self.clamp)


@dataclass(frozen=True, slots=True)
class Gelu:
    """GELU by its tanh approximation."""

    def forward(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """Activate x [tokens, ffn] with probabilities [tokens]: [tokens, ffn] of x's type."""
        function = compiled(gelu_forward) if x.is_cuda else gelu_forward
        return function(x, probabilities)

    def backward(self, grad: Tensor, x: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the probabilities, from the gradient of the output [tokens, ffn]."""
        function = compiled(gelu_backward) if x.is_cuda else gelu_backward
        return function(grad, x, probabilities)


ExpertActivation = GatedActivation | Gelu


def gelu(x: Tensor) -> Tensor:
    """GPT-2's GELU, for Megatron-Core's dense MLPs and shared experts."""
    return functional.gelu(x, approximate="tanh")


def expert_activation(config: TransformerConfig) -> ExpertActivation:
    """Read the activation from Megatron-Core's configuration.

    Raises:
        MissingRequirementError: it is neither a gate of SiLU or quick GELU nor GELU.
    """
    if not config.gated_linear_unit and config.activation_func is gelu:
        return Gelu()
    if config.gated_linear_unit and config.activation_func is functional.silu:
        alpha = 1.0
    elif config.gated_linear_unit and config.activation_func is quick_gelu:
        alpha = QUICK_GELU_ALPHA
    else:
        raise MissingRequirementError(
            "the torch-native experts are gated by SiLU or quick GELU, or have GELU without a gate; "
            "choose one of them, or use the transformer_engine kernels"
        )
    return GatedActivation(
        alpha=alpha, offset=config.glu_linear_offset, clamp=config.activation_func_clamp_value
    )


def gated_forward(
    x: Tensor, probabilities: Tensor, alpha: float, offset: float, clamp: float | None
) -> Tensor:
    """The module's equation, in FP32 or better."""
    gate, linear = _clamped(*_halves(x), clamp)
    weight = probabilities.to(gate.dtype).unsqueeze(-1)
    return (gate * torch.sigmoid(alpha * gate) * (linear + offset) * weight).to(x.dtype)


def gated_backward(
    grad: Tensor, x: Tensor, probabilities: Tensor, alpha: float, offset: float, clamp: float | None
) -> tuple[Tensor, Tensor]:
    """The gradient of `gated_forward`.

    With s = sigmoid(alpha * gate), d(gate * s) / d(gate) = s * (1 + alpha * gate * (1 - s)).

    A clamped input gets no gradient, nor does one on the limit (as torch 2.15's clamp; older ones differ).
    """
    raw_gate, raw_linear = _halves(x)
    gate, linear = _clamped(raw_gate, raw_linear, clamp)
    grad = grad.to(gate.dtype)
    sigmoid = torch.sigmoid(alpha * gate)
    activated, shifted = gate * sigmoid, linear + offset
    grad_probabilities = (grad * activated * shifted).sum(dim=-1).to(probabilities.dtype)
    grad = grad * probabilities.to(gate.dtype).unsqueeze(-1)
    grad_gate = grad * shifted * sigmoid * (1 + alpha * gate * (1 - sigmoid))
    grad_linear = grad * activated
    if clamp is not None:
        grad_gate = torch.where(raw_gate < clamp, grad_gate, 0.0)
        grad_linear = torch.where(raw_linear.abs() < clamp, grad_linear, 0.0)
    return torch.cat([grad_gate, grad_linear], dim=-1).to(x.dtype), grad_probabilities


def gelu_forward(x: Tensor, probabilities: Tensor) -> Tensor:
    """GELU times the probabilities, in FP32 or better."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    weight = probabilities.to(wide.dtype).unsqueeze(-1)
    return (0.5 * wide * (1 + torch.tanh(_GELU_SCALE * (wide + _GELU_CUBIC * wide**3))) * weight).to(x.dtype)


def gelu_backward(grad: Tensor, x: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of `gelu_forward`.

    With t = tanh(s (x + c x^3)), d(gelu) / dx = (1 + t) / 2 + x (1 - t^2) s (1 + 3 c x^2) / 2.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    grad = grad.to(wide.dtype)
    tanh = torch.tanh(_GELU_SCALE * (wide + _GELU_CUBIC * wide**3))
    grad_probabilities = (grad * 0.5 * wide * (1 + tanh)).sum(dim=-1).to(probabilities.dtype)
    slope = 0.5 * (1 + tanh + wide * (1 - tanh**2) * _GELU_SCALE * (1 + 3 * _GELU_CUBIC * wide**2))
    weight = probabilities.to(wide.dtype).unsqueeze(-1)
    return (grad * weight * slope).to(x.dtype), grad_probabilities


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    gate, linear = x.to(torch.promote_types(x.dtype, torch.float32)).chunk(2, dim=-1)
    return gate, linear


def _clamped(gate: Tensor, linear: Tensor, clamp: float | None) -> tuple[Tensor, Tensor]:
    if clamp is None:
        return gate, linear
    return gate.clamp(max=clamp), linear.clamp(-clamp, clamp)
