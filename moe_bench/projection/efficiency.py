"""What every operation costs on one GPU, with the grade of evidence behind each answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from moe_bench.errors import BadInputError
from moe_bench.projection.evidence import Grade
from moe_bench.projection.operations import AttentionCore, Gemm, MemoryBound, Number, Pass
from moe_bench.projection.rates import (
    GEMM_HBM_FRACTION,
    KERNEL_START_S,
    gemm_rate,
    gpu_rates,
    group_rate,
)
from moe_bench.results.calibration import Calibration
from moe_bench.spec.system import SystemSpec


class Scale(StrEnum):
    """Which constant of the projection turns a cost in a burst into one sustained through training."""

    GEMM = "gemm"
    LOW_PRECISION_GEMM = "low_precision_gemm"
    ATTENTION = "attention"
    MEMORY = "memory"
    STREAM = "stream"
    """Large plain streaming kernels: optimizer, copies."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of one operation on an otherwise idle GPU, in the parts that training slows down differently."""

    compute_s: float
    """At the burst rate; the projection divides it by the fraction that is sustained."""
    memory_s: float
    """Bytes over the datasheet's bandwidth; the projection divides it by the share that is reached."""
    overhead_s: float
    """Start-up of the kernel on the device."""
    scale: Scale
    grade: Grade
    source: str


class Efficiency:
    """Costs of operations on the GPU of one system."""

    def __init__(
        self, system: SystemSpec, calibration: Sequence[Calibration] = (), tables: None = None
    ) -> None:
        """BadInputError for a system without a GPU, of which nothing is known."""
        if system.gpu is None:
            raise BadInputError(f"{system.key}: gpu: null, so no rate is known; project on another system")
        self._gpu = system.gpu
        self._rates = gpu_rates(system.gpu)

    def gemm(self, operation: Gemm) -> Cost:
        """hypot(F / limit, B / (fraction x HBM bandwidth)) + start, and a start of each group of several."""
        rates = self._rates
        rate = gemm_rate(rates, operation.number, device_name=self._gpu.device_name)
        overhead_s = KERNEL_START_S
        if operation.num_groups > 1:
            grouped = group_rate(operation.in_pass)
            rate = rate.times(grouped.limit_factor)
            overhead_s += operation.num_groups * grouped.start_s
        least_memory_s = operation.num_bytes / self._gpu.hbm_bytes_per_s
        return Cost(
            compute_s=operation.num_flops / rate.limit_flops_per_s,
            memory_s=least_memory_s * GEMM_HBM_FRACTION / rate.hbm_fraction,
            overhead_s=overhead_s,
            scale=Scale.GEMM if operation.number is Number.BF16 else Scale.LOW_PRECISION_GEMM,
            grade=rates.grade,
            source=rates.gemm_source,
        )

    def attention(self, operation: AttentionCore) -> Cost:
        """F / rate(sequence of one rank) + start; the five products of the backward pass are one kernel."""
        rates = self._rates
        rate_flops_per_s = rates.attention_flops_per_s(
            head_dim=(operation.qk_head_dim + operation.v_head_dim) / 2,
            num_tokens=operation.seq_len / operation.context,
            is_forward=operation.in_pass in (Pass.FORWARD, Pass.RECOMPUTE),
        )
        return Cost(
            compute_s=operation.num_flops / rate_flops_per_s,
            memory_s=0.0,
            overhead_s=KERNEL_START_S,
            scale=Scale.ATTENTION,
            grade=rates.grade,
            source=rates.attention_source,
        )

    def memory(self, operation: MemoryBound) -> Cost:
        """Bytes over the datasheet's bandwidth."""
        return self._bytes(operation.num_bytes, Scale.MEMORY)

    def stream(self, num_bytes: float) -> Cost:
        """Of a large plain kernel that reads and writes `num_bytes`, as an optimizer step or a copy."""
        return self._bytes(num_bytes, Scale.STREAM)

    def _bytes(self, num_bytes: float, scale: Scale) -> Cost:
        return Cost(
            compute_s=0.0,
            memory_s=num_bytes / self._gpu.hbm_bytes_per_s,
            overhead_s=KERNEL_START_S,
            scale=scale,
            grade=Grade.PRIOR,
            source="datasheet bandwidth",
        )


def burst_s(cost: Cost) -> float:
    """Seconds of one call on an idle GPU: what a microbenchmark of the operation would print."""
    share = GEMM_HBM_FRACTION if cost.scale in (Scale.GEMM, Scale.LOW_PRECISION_GEMM) else 1.0
    return math.hypot(cost.compute_s, cost.memory_s / share) + cost.overhead_s
