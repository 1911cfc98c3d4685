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


def backward_call(output: Tensor, inputs: list[Tensor]) -> Callable[[], object]:
    """A call that takes the gradient of `inputs` from a random one of `output`, again and again."""
    gradient = torch.randn_like(output)
    return lambda: torch.autograd.grad(output, inputs, gradient, retain_graph=True)
