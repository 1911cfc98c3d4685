"""What public measurements say of attention to chosen keys, as two laws per architecture: priors."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from moe_bench.projection.evidence.rates import Architecture, AttentionRate, GpuRates, gpu_rates
from moe_bench.projection.work.operations import Number
from moe_bench.spec.system import GpuSpec

SOURCE = "deepseek-ai/FlashMLA README (forward), NVIDIA/cudnn-frontend #318 (backward), priors"

_NUM_HALF_KEYS = 168
_BACKWARD: AttentionRate = AttentionRate(740e12, _NUM_HALF_KEYS)
"""Through 557 and 684 TFLOP/s at 512 and 2,048 chosen keys of 4,096 (64 heads, 512 channels, SM100, taken for
a B200; NVIDIA/cudnn-frontend #318); 320 and 636 at 128 and 1,024, where 307 and 638 were measured."""
_FORWARD: Mapping[Architecture, AttentionRate] = MappingProxyType(
    {
        "hopper": AttentionRate(692e12, _NUM_HALF_KEYS),
        "blackwell": AttentionRate(1570e12, _NUM_HALF_KEYS),
    }
)
"""640 TFLOP/s on an H800 and 1,450 on a B200, the best that deepseek-ai/FlashMLA's README names for its
sparse prefill, taken to be at 2,048 keys; few keys cost as much as backward."""
_REFERENCE: Mapping[Architecture, float] = MappingProxyType({"hopper": 806e12, "blackwell": 1588e12})
"""Limit of BF16 products on the H100 (the same chip) and the B200, by which other GPUs are scaled."""


def sparse_flops_per_s(gpu: GpuSpec, *, num_keys: float, is_forward: bool) -> float:
    """Rate of scores and values of `num_keys` chosen keys per query; nobody published Hopper's backward pass,
    which has Blackwell's ratio to its forward pass.
    """
    rates: GpuRates = gpu_rates(gpu)
    forward = _FORWARD[rates.architecture]
    scale = rates.gemm[Number.BF16].limit_flops_per_s / _REFERENCE[rates.architecture]
    rate = forward.flops_per_s(num_keys) * scale
    if is_forward:
        return rate
    return rate * _BACKWARD.limit_flops_per_s / _FORWARD["blackwell"].limit_flops_per_s
