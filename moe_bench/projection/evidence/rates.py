"""What public measurements say the kernels of a GPU achieve, as laws of few numbers, each with its source.

`python benchmarks/fit_rates.py` prints every number of `_GEMM` and of `_ATTENTION` from the tables of
`aiconfigurator-core`, and with `--simumax FILE` those of grouped products. docs/rates.md has the errors.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from moe_bench.errors import BadInputError
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.work.operations import Number, Pass
from moe_bench.spec.system import GpuSpec

GEMM_HBM_FRACTION = 0.75
"""Share of the datasheet's memory bandwidth that operands of a matrix product reach beside its arithmetic."""
KERNEL_START_S = 3e-6
"""From the start of a kernel to its first useful work, and its tail: 2.5 to 3.2 us in the BF16 tables."""
MEMORY_HBM_FRACTION = 0.5
"""Share of the bandwidth that kernels bound by memory reach: fused permutation 0.50 to 0.51, cross entropy
0.28 to 0.32 (B200, MooreThreads/SimuMax 4dcaae5); a tensor's largest magnitude 0.39, its scaling 0.89 (H100,
aiconfigurator-core 0.12.0). Measured costs are relative to it; the projection fits its own."""
STREAM_HBM_FRACTION = 0.87
"""The same of large plain copies: 2,903 of 3,350 GB/s (Voltage Park, 32 H100)."""

Architecture = Literal["hopper", "blackwell"]


@dataclass(frozen=True, slots=True)
class GemmRate:
    """seconds = hypot(F / limit, B / (fraction x HBM bandwidth)) + KERNEL_START_S."""

    limit_flops_per_s: float
    hbm_fraction: float = GEMM_HBM_FRACTION

    def times(self, factor: float) -> GemmRate:
        """The same law at another limit."""
        return GemmRate(self.limit_flops_per_s * factor, self.hbm_fraction)


@dataclass(frozen=True, slots=True)
class AttentionRate:
    """rate(n) = limit / (1 + half / n) over n tokens of causal sequence: half of the limit at n = half."""

    limit_flops_per_s: float
    num_half_tokens: int

    def flops_per_s(self, num_tokens: float) -> float:
        """At sequences of `num_tokens`, over which a query sees half as many keys on average."""
        return self.limit_flops_per_s / (1 + self.num_half_tokens / num_tokens)


@dataclass(frozen=True, slots=True)
class GroupRate:
    """How Transformer Engine's grouped product differs from one product as large, in one pass."""

    limit_factor: float
    start_s: float
    """Per group: its kernel's start and the SMs that its last tiles leave idle."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRates:
    """Rates of one GPU in a burst of one kernel on an idle device."""

    gemm: Mapping[Number, GemmRate]
    """Number formats that the GPU lacks are absent."""
    attention: Mapping[int, AttentionRate]
    """Forward, by the mean of the two head dimensions."""
    architecture: Architecture
    attention_start_s: float
    """Of a forward call; backward none was seen."""
    quantization_hbm_fraction: float
    sustained_ratio: float
    """Share of its burst rate that long work leaves of matrix products, over that of an H100."""
    grade: Grade
    gemm_source: str
    attention_source: str

    def attention_flops_per_s(self, *, head_dim: float, num_tokens: float, is_forward: bool) -> float:
        """Achieved rate of what a causal mask leaves of `num_tokens`, a sequence or a window.

        Between two head dimensions linear in their logarithm. backward(d, n) = forward(d, n) x
        backward(160, n) / forward(160, n), by architecture: only the head dimensions of DeepSeek-V3 are
        published in both directions.
        """
        reach = num_tokens
        if num_tokens < SHORTEST_SEQUENCE:
            reach /= _WINDOW_HALF[self.architecture]
        dims = sorted(self.attention)
        above = bisect.bisect_left(dims, head_dim)
        low, high = dims[max(above - 1, 0)], dims[min(above, len(dims) - 1)]
        rate = self.attention[low].flops_per_s(reach)
        if high != low:
            share = math.log(head_dim / low) / math.log(high / low)
            rate += share * (self.attention[high].flops_per_s(reach) - rate)
        if is_forward:
            return rate
        forward, backward = _CUDNN[self.architecture]
        return rate * backward.flops_per_s(reach) / forward.flops_per_s(reach)


SHORTEST_SEQUENCE = 1024
"""Tokens; attention to fewer is a window, since no training sequence is as short."""
_WINDOW_HALF: Mapping[Architecture, float] = MappingProxyType({"hopper": 0.5, "blackwell": 0.8})
"""Half tokens of a window of 128 over those of a sequence: every query of a window sees all of it, half of a
sequence on average, and tiles at its edges are computed whole. 0.46 to 0.55 and 0.72 to 0.86 in vLLM's tables
for head dimensions 64 and 128."""
_ATTENTION_START_S: Mapping[Architecture, float] = MappingProxyType({"hopper": 25e-6, "blackwell": 50e-6})
"""H100 tables of vLLM with head dimension 128; cuDNN with 32 to 128 heads on a B200 (SimuMax 4dcaae5)."""

_QUANTIZATION_HBM_FRACTION: Mapping[Architecture, float] = MappingProxyType(
    {"hopper": 0.58, "blackwell": 0.75}
)
"""Share of the bandwidth that quantization reaches, counting every read: 0.50 (blocks) and 0.66 (per tensor)
on an H100; 0.54 to 0.57 (per tensor), 0.80 to 0.84 (blocks) and 0.70 to 0.89 (NVFP4) on Blackwell, fitted
beside the products (benchmarks/fit_rates.py)."""

_H100, _H200 = "NVIDIA H100 80GB HBM3", "NVIDIA H200"
_B200, _GB200, _GB300 = "NVIDIA B200", "NVIDIA GB200", "NVIDIA GB300"

_GEMM: Mapping[str, Mapping[Number, GemmRate]] = MappingProxyType(
    {
        _H100: {
            Number.BF16: GemmRate(806e12),
            Number.FP8_TENSORWISE: GemmRate(1489e12, 0.64),
            Number.FP8_BLOCKWISE: GemmRate(1229e12, 0.41),
        },
        _H200: {
            Number.BF16: GemmRate(792e12),
            Number.FP8_TENSORWISE: GemmRate(1484e12, 0.49),
            Number.FP8_BLOCKWISE: GemmRate(1249e12, 0.29),
        },
        _B200: {
            Number.BF16: GemmRate(1588e12),
            Number.FP8_TENSORWISE: GemmRate(3149e12, 0.54),
            Number.FP8_BLOCKWISE: GemmRate(3149e12, 0.54),
            Number.MXFP8: GemmRate(3149e12, 0.54),
            Number.NVFP4: GemmRate(4522e12, 0.56),
        },
        _GB200: {
            Number.BF16: GemmRate(1717e12),
            Number.FP8_TENSORWISE: GemmRate(3357e12, 0.51),
            Number.FP8_BLOCKWISE: GemmRate(3357e12, 0.51),
            Number.MXFP8: GemmRate(3357e12, 0.51),
            Number.NVFP4: GemmRate(4754e12, 0.56),
        },
        _GB300: {
            Number.BF16: GemmRate(1966e12),
            Number.FP8_TENSORWISE: GemmRate(3954e12, 0.53),
            Number.FP8_BLOCKWISE: GemmRate(3954e12, 0.53),
            Number.MXFP8: GemmRate(3954e12, 0.53),
            Number.NVFP4: GemmRate(6845e12, 0.30),
        },
    }
)
"""TensorRT-LLM 1.3.0rc20's linear layers, net of the quantization that the tables of low precision include.
All FP8 of Blackwell has the limit of the tables' `fp8_block`: MXFP8, whose scales cover 32 elements instead
of 128, and FP8 scaled per tensor, which its tensor cores run no slower, whatever the tables' own kernel
reaches (3,085, 3,034 and 3,691 TFLOP/s)."""

_CUDNN: Mapping[Architecture, tuple[AttentionRate, AttentionRate]] = MappingProxyType(
    {
        "hopper": (AttentionRate(672e12, 885), AttentionRate(568e12, 1420)),
        "blackwell": (AttentionRate(1875e12, 1703), AttentionRate(1390e12, 1161)),
    }
)
"""Forward and backward with head dimensions 192 and 128, through both points of arXiv:2603.07685, table 9
(results/published/deepseek_v3_attention.yaml)."""

_ATTENTION: Mapping[str, Mapping[int, AttentionRate]] = MappingProxyType(
    {
        _H100: {
            64: AttentionRate(525e12, 976),
            128: AttentionRate(654e12, 912),
            160: AttentionRate(672e12, 885),
            256: AttentionRate(773e12, 852),
        },
        _H200: {
            64: AttentionRate(516e12, 958),
            128: AttentionRate(644e12, 876),
            160: AttentionRate(672e12, 885),
            256: AttentionRate(757e12, 804),
        },
        _B200: {
            64: AttentionRate(805e12, 713),
            128: AttentionRate(1323e12, 887),
            160: AttentionRate(1739e12, 1703),
            256: AttentionRate(1481e12, 864),
        },
        _GB200: {
            64: AttentionRate(858e12, 688),
            128: AttentionRate(1422e12, 834),
            160: AttentionRate(1875e12, 1703),
            256: AttentionRate(1623e12, 820),
        },
        _GB300: {
            64: AttentionRate(1224e12, 1046),
            128: AttentionRate(1855e12, 956),
            160: AttentionRate(2248e12, 1703),
            256: AttentionRate(1839e12, 858),
        },
    }
)
"""64, 128 and 256: vLLM 0.24.0's kernels (FlashAttention 3 on Hopper). 160 (192 and 128): cuDNN's law above,
its Blackwell taken for a GB200; B200 and GB300 scaled by what TensorRT-LLM's kernel of the same dimensions
achieves there."""

_GROUPED: Mapping[Pass, GroupRate] = MappingProxyType(
    {
        Pass.FORWARD: GroupRate(1.0, 3.7e-6),
        Pass.RECOMPUTE: GroupRate(1.0, 3.7e-6),
        Pass.DGRAD: GroupRate(1.0, 5.7e-6),
        Pass.WGRAD: GroupRate(0.80, 0.9e-6),
    }
)
"""108 grouped products on a B200 beside its dense ones (MooreThreads/SimuMax 4dcaae5, Apache-2.0)."""

_SUSTAINED: Mapping[str, float] = MappingProxyType(
    {_H100: 705 / 765, _H200: 705 / 765, _B200: 1228 / 1471, _GB200: 1344 / 1567, _GB300: 1662 / 1812}
)
"""BF16 products of more than 100 TFLOP over those of 0.1 to 1: the longer, the lower the clock under the
power limit (medians of aiconfigurator-core 0.12.0's tables, docs/rates.md). An H200 as an H100."""

_SAME_CHIP: Mapping[str, str] = MappingProxyType({"NVIDIA H800": _H100})
"""GPUs with the SMs, clocks, power and memory of another; their links are their own (recipes/systems)."""
_REFERENCE: Mapping[Architecture, tuple[str, float, float]] = MappingProxyType(
    {"hopper": (_H100, 989.4e12, 700.0), "blackwell": (_B200, 2250e12, 1000.0)}
)
"""GPU that the unmeasured ones of an architecture are scaled from, its datasheet's BF16 rate and power."""


def gpu_rates(gpu: GpuSpec) -> GpuRates:
    """Rates of `gpu`: measured on it, on the same chip, or scaled from its architecture by the datasheet."""
    name = _SAME_CHIP.get(gpu.device_name, gpu.device_name)
    if name in _GEMM:
        scale, grade, where = 1.0, Grade.PUBLISHED, name
    else:
        name, reference_flops_per_s, reference_w = _REFERENCE[gpu.architecture]
        scale = gpu.bf16_flops_per_s / reference_flops_per_s
        # below its power limit a chip's clock follows the cube root of the power (voltage falls with it)
        scale *= min(1.0, (gpu.max_power_w / reference_w) ** (1 / 3))
        grade, where = Grade.PRIOR, f"{name}, scaled by the datasheets' BF16 rates and power"
    return GpuRates(
        gemm={number: rate.times(scale) for number, rate in _GEMM[name].items()},
        attention={
            dim: AttentionRate(rate.limit_flops_per_s * scale, rate.num_half_tokens)
            for dim, rate in _ATTENTION[name].items()
        },
        architecture=gpu.architecture,
        attention_start_s=_ATTENTION_START_S[gpu.architecture],
        quantization_hbm_fraction=_QUANTIZATION_HBM_FRACTION[gpu.architecture],
        sustained_ratio=_SUSTAINED[name] / _SUSTAINED[_H100],
        grade=grade,
        gemm_source=f"law of aiconfigurator-core 0.12.0's products on {where}",
        attention_source=f"laws of arXiv:2603.07685 and aiconfigurator-core 0.12.0 on {where}",
    )


def gemm_rate(rates: GpuRates, number: Number, *, device_name: str) -> GemmRate:
    """Law of products in `number`; BadInputError where nothing is known about it on this GPU."""
    rate = rates.gemm.get(number)
    if rate is None:
        known = ", ".join(sorted(rates.gemm))
        raise BadInputError(
            f"{device_name}: no measured rate of products in {number}; known: {known}; change the precision"
        )
    return rate


def attended_tokens(*, seq_len: int, context: int) -> float:
    """Tokens that a rank works on at a time: its share of a sequence, or a whole window."""
    return seq_len if seq_len < SHORTEST_SEQUENCE else seq_len / context


def group_rate(in_pass: Pass) -> GroupRate:
    """Of grouped products in this pass."""
    return _GROUPED[in_pass]
