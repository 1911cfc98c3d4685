"""torch's grouped FP8 product, which no CPU has, in float64 and behind torch's own argument checks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

from moe_bench.harness.kernels.fp8_quantize import Quantized as Rows
from moe_bench.harness.quantize import packed
from moe_bench.harness.quantize.program import Quantized
from moe_bench.harness.workers import Seat
from moe_bench.spec.quantization import QuantizeJob
from tests.harness.kernels.fp8_references import product_reference
from tests.harness.quantize.jobs import work


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """The dense product stays torch's own, which has a kernel for the CPU."""

    def product(
        rows: Tensor,
        weight: Tensor,
        row_scales: Tensor,
        row_recipe: object,
        weight_scales: Tensor,
        weight_recipe: object,
        *,
        offs: Tensor,
        use_fast_accum: bool,
    ) -> Tensor:
        assert row_recipe == weight_recipe == ScalingType.RowWise
        assert use_fast_accum
        arguments = (rows, weight, row_scales, weight_scales, offs)
        torch._scaled_grouped_mm(*(one.to("meta") for one in arguments), out_dtype=torch.bfloat16)
        assert rows.shape[-1] % 16 == weight.shape[-1] % 16 == 0
        factors = Rows(rows, row_scales), Rows(weight.transpose(1, 2), weight_scales)
        return product_reference(*factors, offs).bfloat16()

    with mock.patch.object(packed, "scaled_grouped_mm", product):
        yield


def work_emulated(job: QuantizeJob, checkpoint: Path | None, seat: Seat) -> Quantized:
    """As `jobs.work`."""
    with emulated():
        return work(job, checkpoint, seat)
