"""Inputs of a timed call: random numbers, since products of zeros draw less power and run faster."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from moe_bench.results.calibration import Dtype

DTYPES: Mapping[Dtype, torch.dtype] = MappingProxyType(
    {
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
    }
)


def normal(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    """Standard normal numbers, contiguous."""
    if dtype.itemsize == 1:
        return torch.randn(shape, dtype=torch.bfloat16, device=device).to(dtype)
    return torch.randn(shape, dtype=dtype, device=device)


class FreshBackward:
    """A backward pass that is not run twice: Transformer Engine frees what it has saved for it.

    `before` runs the forward pass that the next call goes back through.
    """

    def __init__(self, forward: Callable[[], Tensor], inputs: list[Tensor]) -> None:
        self._forward, self._inputs = forward, inputs
        self._output = forward()
        self._gradient = torch.randn_like(self._output)

    def before(self) -> None:
        """Run forward."""
        self._output = self._forward()

    def __call__(self) -> object:
        """Take the gradients; weights whose gradient is added to another tensor have none here."""
        return torch.autograd.grad(self._output, self._inputs, self._gradient, allow_unused=True)


def backward_call(output: Tensor, inputs: list[Tensor]) -> Callable[[], object]:
    """A call that takes the gradient of `inputs` from a random one of `output`, again and again."""
    gradient = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)
