"""The tables of `aiconfigurator-core` as evidence of the projection, read when an operation first asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

from moe_bench.projection.evidence.calibrated_shapes import Kernel
from moe_bench.projection.evidence.nearest_shapes import Miss, NearestShapes
from moe_bench.projection.evidence.rates import KERNEL_START_S, SHORTEST_SEQUENCE, attended_tokens
from moe_bench.projection.evidence.tables import (
    FOLDERS,
    GemmTable,
    package_version,
    read_attention_table,
    read_gemm_tables,
)
from moe_bench.projection.work.operations import AttentionCore, Gemm, Number, Part, Pass
from moe_bench.spec.system import GpuSpec

_MIN_SIZE = 64
"""Rows, columns and inner size below which no product of training lies."""

_QUANTIZATION: Mapping[str, Mapping[Number, tuple[float, float]]] = MappingProxyType(
    {
        "NVIDIA H100 80GB HBM3": {
            Number.FP8_TENSORWISE: (1.33e12, 10.2e-6),
            Number.FP8_BLOCKWISE: (1.67e12, 3.9e-6),
        },
        "NVIDIA H200": {
            Number.FP8_TENSORWISE: (1.52e12, 10.5e-6),
            Number.FP8_BLOCKWISE: (1.83e12, 3.7e-6),
        },
        "NVIDIA B200": {
            Number.FP8_TENSORWISE: (2.63e12, 15.4e-6),
            Number.FP8_BLOCKWISE: (6.47e12, 6.5e-6),
            Number.NVFP4: (3.03e12, 7.9e-6),
        },
        "NVIDIA GB200": {
            Number.FP8_TENSORWISE: (2.77e12, 15.0e-6),
            Number.FP8_BLOCKWISE: (6.38e12, 6.1e-6),
            Number.NVFP4: (3.23e12, 7.7e-6),
        },
        "NVIDIA GB300": {
            Number.FP8_TENSORWISE: (2.73e12, 14.9e-6),
            Number.FP8_BLOCKWISE: (6.38e12, 6.2e-6),
            Number.NVFP4: (4.01e12, 9.5e-6),
        },
    }
)
"""Bytes per second of the quantization of one factor that low-precision times include, and start of it and
the product, fitted beside the rates (benchmarks/fit_rates.py): here it is an operation of its own."""


class TableShapes:
    """Products and forward attention of one GPU."""

    def __init__(self, gpu: GpuSpec, law_s: Callable[[Kernel], float]) -> None:
        """`law_s` gives the law's time of a single call. MissingRequirementError without the package."""
        self.source = f"aiconfigurator-core {package_version()}"
        self._gpu = gpu
        self._law_s = law_s
        self._products: dict[Number, NearestShapes] | None = None
        self._attention: Mapping[float, NearestShapes] | None = None

    def lookup(self, operation: Kernel) -> float | Miss:
        """Measured time over the law's at this operation."""
        if self._gpu.device_name not in FOLDERS:
            return Miss(f"no table of {self._gpu.device_name}")
        if isinstance(operation, Gemm):
            return self._product(operation)
        if isinstance(operation, AttentionCore):
            return self._core(operation)
        return Miss("no table of operations bound by memory")

    def _product(self, operation: Gemm) -> float | Miss:
        if operation.num_groups > 1:
            return Miss("no table of grouped products alone, without what surrounds them")
        if operation.accumulates:
            return Miss("no table of products that are added to a gradient")
        if self._products is None:
            tables = read_gemm_tables(self._gpu.device_name, engine="trtllm")
            self._products = {
                number: NearestShapes(*product_ratios(self._gpu, number, table, self._law_s))
                for number, table in tables.items()
            }
        shapes = self._products.get(operation.number)
        if shapes is None:
            return Miss(f"no table of products in {operation.number}")
        return shapes.lookup((operation.num_rows, operation.num_inner, operation.num_columns))

    def _core(self, operation: AttentionCore) -> float | Miss:
        if operation.in_pass not in (Pass.FORWARD, Pass.RECOMPUTE):
            return Miss("no table of attention's backward pass")
        if operation.seq_len < SHORTEST_SEQUENCE:
            return Miss("no table of windows")
        if operation.qk_head_dim != operation.v_head_dim:
            return Miss("no table of a training kernel with two head dimensions")
        if self._attention is None:
            self._attention = self._attention_over_law()
        shapes = self._attention.get(operation.qk_head_dim)
        if shapes is None:
            return Miss(f"no table of attention with head dimension {operation.qk_head_dim}")
        tokens = attended_tokens(seq_len=operation.seq_len, context=operation.context)
        return shapes.lookup((tokens, operation.num_flops**0.5))

    def _attention_over_law(self) -> dict[float, NearestShapes]:
        table = read_attention_table(self._gpu.device_name, engine="vllm")
        points: dict[float, tuple[list[tuple[float, float]], list[float]]] = {}
        if table is None:
            return {}
        is_used = (table.window_tokens == 0) & (table.seq_len >= SHORTEST_SEQUENCE)
        columns = (table.head_dim, table.seq_len, table.num_flops, table.time_s)
        for dim, tokens, flops, time_s in zip(*(column[is_used] for column in columns), strict=True):
            core = AttentionCore(
                in_pass=Pass.FORWARD,
                num_flops=flops,
                seq_len=round(tokens),
                context=1,
                qk_head_dim=round(dim),
                v_head_dim=round(dim),
            )
            sizes, ratios = points.setdefault(dim, ([], []))
            sizes.append((tokens, flops**0.5))
            ratios.append(time_s / self._law_s(core))
        return {dim: NearestShapes(sizes, ratios) for dim, (sizes, ratios) in points.items()}


def product_ratios(
    gpu: GpuSpec, number: Number, table: GemmTable, law_s: Callable[[Kernel], float]
) -> tuple[list[tuple[float, float, float]], list[float]]:
    """Rows, inner size and columns of every product of a size that training has; its time over the law's."""
    sizes, ratios = [], []
    rate_bytes_per_s, start_s = _QUANTIZATION[gpu.device_name].get(number, (math.inf, KERNEL_START_S))
    shapes = zip(table.num_rows, table.num_inner, table.num_columns, table.time_s, strict=True)
    for rows, inner, columns, time_s in shapes:
        if min(rows, inner, columns) < _MIN_SIZE:
            continue
        product = Gemm(
            part=Part.DENSE_MLP,
            in_pass=Pass.FORWARD,
            num_rows=rows,
            num_inner=inner,
            num_columns=columns,
            number=number,
        )
        quantization_s = (2 + number.element_bytes) * rows * inner / rate_bytes_per_s + start_s
        sizes.append((rows, inner, columns))
        ratios.append(time_s / (law_s(product) - KERNEL_START_S + quantization_s))
    return sizes, ratios
