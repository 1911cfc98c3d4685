"""What every operation costs on one GPU, with the grade of evidence behind each answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from types import MappingProxyType

from moe_bench.errors import BadInputError
from moe_bench.projection.evidence.calibrated_shapes import CalibratedShapes, Kernel, kind_of
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.evidence.nearest_shapes import Miss
from moe_bench.projection.evidence.rates import (
    GEMM_HBM_FRACTION,
    KERNEL_START_S,
    MEMORY_HBM_FRACTION,
    STREAM_HBM_FRACTION,
    attended_tokens,
    gemm_rate,
    gpu_rates,
    group_rate,
)
from moe_bench.projection.evidence.sparse_rates import SOURCE, sparse_flops_per_s
from moe_bench.projection.evidence.table_shapes import TableShapes
from moe_bench.projection.work.operations import (
    AttentionCore,
    Gemm,
    MemoryBound,
    Number,
    Part,
    Pass,
    SparseCore,
)
from moe_bench.results.calibration import Calibration
from moe_bench.spec.system import SystemSpec


class Scale(StrEnum):
    """Which constant of the projection turns a cost in a burst into one sustained through training."""

    GEMM = "gemm"
    LOW_PRECISION_GEMM = "low_precision_gemm"
    FP4_GEMM = "fp4_gemm"
    ATTENTION = "attention"
    MEMORY = "memory"
    QUANTIZATION = "quantization"
    """None: the share of the memory's bandwidth is the one measured beside the products of low precision."""
    STREAM = "stream"
    """Large plain streaming kernels: optimizer, copies."""


_PRODUCT_BYTES = 2
"""Per element of a BF16 product, which the tables hold."""

_HBM_FRACTION: Mapping[Scale, float] = MappingProxyType(
    {
        Scale.GEMM: GEMM_HBM_FRACTION,
        Scale.LOW_PRECISION_GEMM: GEMM_HBM_FRACTION,
        Scale.FP4_GEMM: GEMM_HBM_FRACTION,
        Scale.ATTENTION: 1.0,
        Scale.MEMORY: MEMORY_HBM_FRACTION,
        Scale.QUANTIZATION: 1.0,
        Scale.STREAM: STREAM_HBM_FRACTION,
    }
)


_GEMM_SCALES: Mapping[Number, Scale] = MappingProxyType(
    {Number.BF16: Scale.GEMM, Number.NVFP4: Scale.FP4_GEMM}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time of one operation on an otherwise idle GPU, in the parts that training slows down differently."""

    compute_s: float
    """At the burst rate; the projection divides it by the fraction that is sustained."""
    memory_s: float
    """At the datasheet's bandwidth; the projection divides it by the share that is reached. Where kernels
    reach another share than their scale's in rates.py, it is as much longer."""
    overhead_s: float
    """Start-up of the kernel on the device, or of its groups."""
    scale: Scale
    grade: Grade
    source: str

    @property
    def burst_s(self) -> float:
        """What a microbenchmark of the operation would print."""
        return math.hypot(self.compute_s, self.memory_s / _HBM_FRACTION[self.scale]) + self.overhead_s


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A kind of operation for which better evidence than the law was asked in vain, and why."""

    kind: str
    asked: str
    reason: str


class Efficiency:
    """Costs of operations on the GPU of one system: measured here, else in the tables, else by law.

    Without `calibration` and `tables` answers depend on the system alone, on any machine.
    """

    def __init__(
        self, system: SystemSpec, calibration: Sequence[Calibration] = (), *, tables: bool = False
    ) -> None:
        """`calibration`: measurements on this GPU. `tables`: ask `aiconfigurator-core` too.

        Raises BadInputError for a system without a GPU or calibration of another GPU, MissingRequirementError
        for tables that are not installed.
        """
        if system.gpu is None:
            raise BadInputError(f"{system.key}: gpu: null, so no rate is known; project on another system")
        self._gpu = system.gpu
        self._rates = gpu_rates(system.gpu)
        self._sources: list[tuple[CalibratedShapes | TableShapes, Grade, str]] = []
        if calibration:
            shapes = CalibratedShapes(system.gpu, calibration, self.law_s)
            self._sources.append((shapes, Grade.MEASURED_HERE, f"calibration of {system.gpu.device_name}"))
        if tables:
            table_shapes = TableShapes(system.gpu, self.law_s)
            self._sources.append((table_shapes, Grade.MEASURED_ELSEWHERE, table_shapes.source))
        self._known: dict[Kernel, Cost] = {}
        self._unanswered: dict[Unanswered, None] = {}

    @property
    def sustained_ratio(self) -> float:
        """What long work leaves of the rate of this GPU's products, over what it leaves of an H100's."""
        return self._rates.sustained_ratio

    @property
    def unanswered(self) -> tuple[Unanswered, ...]:
        """Lookups so far that the law answered although better evidence was asked for; empty without any."""
        return tuple(self._unanswered)

    def gemm(self, operation: Gemm) -> Cost:
        """Of all groups of a product; BadInputError for a number format without rates on this GPU."""
        return self._best(operation, self._gemm_law)

    def attention(self, operation: AttentionCore) -> Cost:
        """Of one call forward, or of one call backward, whose five products are one kernel."""
        return self._best(operation, self._attention_law)

    def sparse_attention(self, operation: SparseCore) -> Cost:
        """Of one call forward or backward; a prior, since nobody timed a training step of such kernels."""
        is_forward = operation.in_pass in (Pass.FORWARD, Pass.RECOMPUTE)
        rate = sparse_flops_per_s(self._gpu, num_keys=operation.num_keys, is_forward=is_forward)
        return Cost(
            compute_s=operation.num_flops / rate,
            memory_s=0.0,
            overhead_s=KERNEL_START_S,
            scale=Scale.ATTENTION,
            grade=Grade.PRIOR,
            source=SOURCE,
        )

    def memory(self, operation: MemoryBound) -> Cost:
        """Of an operation of a layer that moves bytes and computes little."""
        return self._best(operation, self._memory_law)

    def stream(self, num_bytes: float) -> Cost:
        """Of a large plain kernel that reads and writes `num_bytes`, as an optimizer step or a copy."""
        return self._bytes(num_bytes, Scale.STREAM)

    def _best[Kind: (Gemm, AttentionCore, MemoryBound)](
        self, operation: Kind, law: Callable[[Kind], Cost]
    ) -> Cost:
        """The law's cost, times what the best source that knows the shape measured relative to it."""
        if not self._sources:
            return law(operation)
        known = self._known.get(operation)
        if known is None:
            known = self._known[operation] = self._measured(operation, law(operation))
        return known

    def _measured(self, operation: Kernel, cost: Cost) -> Cost:
        for shapes, grade, source in self._sources:
            ratio = shapes.lookup(operation)
            if isinstance(ratio, Miss):
                kind = ", ".join(kind_of(operation))
                self._unanswered[Unanswered(kind, grade.label, ratio.reason)] = None
                continue
            return replace(
                cost,
                compute_s=cost.compute_s * ratio,
                memory_s=cost.memory_s * ratio,
                overhead_s=cost.overhead_s * ratio,
                grade=grade,
                source=source,
            )
        return cost

    def law_s(self, operation: Kernel) -> float:
        """Time of a single call by the law alone, whatever was measured."""
        if isinstance(operation, Gemm):
            return self._gemm_law(operation).burst_s
        if isinstance(operation, AttentionCore):
            return self._attention_law(operation).burst_s
        return self._memory_law(operation).burst_s

    def _gemm_law(self, operation: Gemm) -> Cost:
        """hypot(F / limit, B / (fraction x HBM bandwidth)) + start, and a start of each group of several.

        The fraction of a low-precision kernel is that of the bytes in the tables; what a gradient adds
        to them is a stream, as in BF16.
        """
        rates = self._rates
        rate = gemm_rate(rates, operation.number, device_name=self._gpu.device_name)
        overhead_s = KERNEL_START_S
        if operation.num_groups > 1:
            grouped = group_rate(operation.in_pass)
            rate = rate.times(grouped.limit_factor)
            overhead_s += operation.num_groups * grouped.start_s
        added_bytes = (
            (2 * operation.gradient_bytes - _PRODUCT_BYTES)
            * operation.num_rows
            * operation.num_columns
            * operation.num_groups
        )
        added_bytes *= operation.accumulates
        fitted_bytes = (operation.num_bytes - added_bytes) * GEMM_HBM_FRACTION / rate.hbm_fraction
        return Cost(
            compute_s=operation.num_flops / rate.limit_flops_per_s,
            memory_s=(fitted_bytes + added_bytes) / self._gpu.hbm_bytes_per_s,
            overhead_s=overhead_s,
            scale=_GEMM_SCALES.get(operation.number, Scale.LOW_PRECISION_GEMM),
            grade=rates.grade,
            source=rates.gemm_source,
        )

    def _attention_law(self, operation: AttentionCore) -> Cost:
        """F / rate(sequence of one rank, or window) + start."""
        rates = self._rates
        is_forward = operation.in_pass in (Pass.FORWARD, Pass.RECOMPUTE)
        rate_flops_per_s = rates.attention_flops_per_s(
            head_dim=(operation.qk_head_dim + operation.v_head_dim) / 2,
            num_tokens=attended_tokens(seq_len=operation.seq_len, context=operation.context),
            is_forward=is_forward,
        )
        return Cost(
            compute_s=operation.num_flops / rate_flops_per_s,
            memory_s=0.0,
            overhead_s=rates.attention_start_s if is_forward else KERNEL_START_S,
            scale=Scale.ATTENTION,
            grade=rates.grade,
            source=rates.attention_source,
        )

    def _memory_law(self, operation: MemoryBound) -> Cost:
        """Bytes over the datasheet's bandwidth; quantization over its own share of it."""
        if operation.part is not Part.QUANTIZATION:
            return self._bytes(operation.num_bytes, Scale.MEMORY)
        cost = self._bytes(operation.num_bytes, Scale.QUANTIZATION)
        return replace(
            cost,
            memory_s=cost.memory_s / self._rates.quantization_hbm_fraction,
            grade=self._rates.grade,
            source=self._rates.gemm_source,
        )

    def _bytes(self, num_bytes: float, scale: Scale) -> Cost:
        """Bytes over the datasheet's bandwidth, plus start."""
        return Cost(
            compute_s=0.0,
            memory_s=num_bytes / self._gpu.hbm_bytes_per_s,
            overhead_s=KERNEL_START_S,
            scale=scale,
            grade=Grade.PRIOR,
            source="bandwidth of the datasheet",
        )
