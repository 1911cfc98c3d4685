"""What several peers' layers are put together from: linear layers and experts on weights that are given."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.layer.weights import LayerWeights
from moe_bench.spec.activation import Activation

GPT_OSS_ALPHA = 1.702
"""Gain of the sigmoid in the clamped SwiGLU (github.com/openai/gpt-oss, gpt_oss/torch/model.py)."""


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation of an expert: [..., 2n] to [..., n], gate first, or [..., n] where it is not gated."""
    if activation.kind == "gelu":
        return functional.gelu(x)
    if activation.kind == "squared_relu":
        return functional.relu(x).square()
    gate, linear = x.chunk(2, dim=-1)
    if activation.kind == "swiglu":
        return functional.silu(gate) * linear
    if activation.kind == "geglu":
        return functional.gelu(gate) * linear
    if (limit := activation.clamp_limit) is not None:
        gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
    return gate * torch.sigmoid(GPT_OSS_ALPHA * gate) * (linear + activation.linear_offset)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A linear layer on the memory of `weight` [out, in] and `bias` [out]; nothing is copied."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


class Expert(nn.Module):
    """A feed-forward network: two matrices around an activation."""

    def __init__(self, fc1: nn.Linear, fc2: nn.Linear, activation: Activation) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation = fc1, fc2, activation

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        y: Tensor = self.fc2(activate(self.fc1(x), self.activation))
        return y


def experts_of(weights: LayerWeights, activation: Activation) -> Iterator[Expert]:
    """The routed experts, one module each, on the memory of `weights`."""
    fc1_bias = [None] * len(weights.fc1) if weights.fc1_bias is None else weights.fc1_bias
    fc2_bias = [None] * len(weights.fc2) if weights.fc2_bias is None else weights.fc2_bias
    for fc1, bias1, fc2, bias2 in zip(weights.fc1, fc1_bias, weights.fc2, fc2_bias, strict=True):
        yield Expert(linear_of(fc1, bias1), linear_of(fc2, bias2), activation)


def expert_gradients(experts: Iterable[Expert]) -> dict[str, Tensor]:
    """Gradients of routed experts in canonical form."""
    experts = list(experts)
    stacked = {}
    for name in ("fc1", "fc2"):
        linears = [getattr(expert, name) for expert in experts]
        stacked[name] = torch.stack([_made(linear.weight) for linear in linears])
        if linears[0].bias is not None:
            stacked[f"{name}_bias"] = torch.stack([_made(linear.bias) for linear in linears])
    return stacked


def gradient_of(parameter: Tensor) -> Tensor:
    """A copy of the gradient that a backward pass left.

    Raises MissingRequirementError where it left none.
    """
    return _made(parameter).clone()


def _made(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        raise MissingRequirementError(
            f"a weight of shape {tuple(parameter.shape)} has no gradient; the backward pass does not reach "
            "it, so nothing of it can be compared"
        )
    return parameter.grad.detach()


def drop_gradients(module: nn.Module) -> None:
    """Before the next backward pass: every gradient is made anew."""
    module.zero_grad(set_to_none=True)
