"""What public measurements say a GPU achieves: rates of its kernels, each with its grade and source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moe_bench.errors import BadInputError
from moe_bench.projection.evidence import Grade
from moe_bench.projection.operations import Number
from moe_bench.spec.system import GpuSpec

GEMM_HBM_FRACTION = 0.75
"""Share of the datasheet's memory bandwidth that the operands of a matrix product reach."""
KERNEL_START_S = 3e-6
"""From the start of a kernel on the device to its first useful work."""

_TABLES = "law of aiconfigurator-core 0.12.0's GEMM tables"
_SDPA = "law of arXiv:2603.07685, table 9 (cuDNN, 192/128 head dimensions)"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRate:
    """rate(s) = limit / (1 + half_tokens / s): half of the limit is reached at `half_tokens`."""

    limit_flops_per_s: float
    num_half_tokens: float

    def flops_per_s(self, num_tokens: float) -> float:
        """At `num_tokens` keys per query at most."""
        return self.limit_flops_per_s / (1 + self.num_half_tokens / num_tokens)

    def times(self, factor: float) -> AttentionRate:
        """The same shape at another limit."""
        return AttentionRate(
            limit_flops_per_s=self.limit_flops_per_s * factor, num_half_tokens=self.num_half_tokens
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuRates:
    """Rates of one GPU, in a burst of one kernel on an otherwise idle device."""

    gemm_flops_per_s: Mapping[Number, float]
    """Limit of large products; number formats that the GPU lacks are absent."""
    gemm_grade: Grade
    gemm_source: str
    attention_forward: AttentionRate
    attention_backward: AttentionRate
    attention_grade: Grade
    attention_source: str


_GEMM_FLOPS_PER_S: Mapping[str, Mapping[Number, float]] = MappingProxyType(
    {
        "NVIDIA H100 80GB HBM3": {
            Number.BF16: 794e12,
            Number.FP8_TENSORWISE: 1374e12,
            Number.FP8_BLOCKWISE: 1204e12,
        },
        "NVIDIA B200": {
            Number.BF16: 1574e12,
            Number.FP8_TENSORWISE: 3238e12,
            Number.FP8_BLOCKWISE: 3238e12,
            Number.MXFP8: 3238e12,
            Number.NVFP4: 4589e12,
        },
        "NVIDIA GB200": {
            Number.BF16: 1700e12,
            Number.FP8_TENSORWISE: 3428e12,
            Number.FP8_BLOCKWISE: 3428e12,
            Number.MXFP8: 3428e12,
            Number.NVFP4: 4841e12,
        },
        "NVIDIA GB300": {
            Number.BF16: 1964e12,
            Number.FP8_TENSORWISE: 4043e12,
            Number.FP8_BLOCKWISE: 4043e12,
            Number.MXFP8: 4043e12,
            Number.NVFP4: 7015e12,
        },
    }
)
_SAME_CHIP: Mapping[str, str] = MappingProxyType(
    {"NVIDIA H800": "NVIDIA H100 80GB HBM3", "NVIDIA H200": "NVIDIA H100 80GB HBM3"}
)
"""GPUs with the SMs, clocks and power of another one; memory and links are their own (`recipes/systems`)."""
_REFERENCE: Mapping[str, str] = MappingProxyType(
    {"hopper": "NVIDIA H100 80GB HBM3", "blackwell": "NVIDIA B200"}
)
"""GPU of each architecture that the unmeasured ones are scaled from, and its datasheet rates below."""
_REFERENCE_BF16_FLOPS_PER_S: Mapping[str, float] = MappingProxyType(
    {"hopper": 989.4e12, "blackwell": 2250.0e12}
)

_ATTENTION: Mapping[str, tuple[AttentionRate, AttentionRate]] = MappingProxyType(
    {
        "hopper": (
            AttentionRate(limit_flops_per_s=668e12, num_half_tokens=850),
            AttentionRate(limit_flops_per_s=560e12, num_half_tokens=1340),
        ),
        "blackwell": (
            AttentionRate(limit_flops_per_s=1870e12, num_half_tokens=1690),
            AttentionRate(limit_flops_per_s=1390e12, num_half_tokens=1160),
        ),
    }
)


def gpu_rates(gpu: GpuSpec) -> GpuRates:
    """Rates of `gpu`: measured on it, on the same chip, or scaled from its architecture by the datasheet."""
    forward, backward = _ATTENTION[gpu.architecture]
    name = _SAME_CHIP.get(gpu.device_name, gpu.device_name)
    if name in _GEMM_FLOPS_PER_S:
        scale, grade, of = 1.0, Grade.PUBLISHED, f"on {name}"
        gemm = _GEMM_FLOPS_PER_S[name]
    else:
        name = _REFERENCE[gpu.architecture]
        scale = gpu.bf16_flops_per_s / _REFERENCE_BF16_FLOPS_PER_S[gpu.architecture]
        grade, of = Grade.PRIOR, f"on {name}, scaled by the datasheet's BF16 rate"
        gemm = {number: rate * scale for number, rate in _GEMM_FLOPS_PER_S[name].items()}
    return GpuRates(
        gemm_flops_per_s=gemm,
        gemm_grade=grade,
        gemm_source=f"{_TABLES} {of}",
        attention_forward=forward.times(scale),
        attention_backward=backward.times(scale),
        attention_grade=grade,
        attention_source=_SDPA,
    )


def require_number(rates: GpuRates, number: Number, device_name: str) -> float:
    """Limit of products in `number`; BadInputError where nothing is known about it on this GPU."""
    rate = rates.gemm_flops_per_s.get(number)
    if rate is None:
        known = ", ".join(sorted(rates.gemm_flops_per_s))
        raise BadInputError(
            f"{device_name}: no measured rate of products in {number}; it has {known}; change the precision"
        )
    return rate
