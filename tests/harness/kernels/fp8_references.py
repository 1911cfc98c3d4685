"""What the FP8 kernels compute, written out plainly in float64, and on a host in the place of both."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import ScalingType

from moe_bench.harness.kernels import fp8_grouped
from moe_bench.harness.kernels.fp8_quantize import E4M3, Quantized

LARGEST = 448.0


def rows_reference(x: Tensor) -> Quantized:
    """One row at a time: the least power of two that brings its largest number to 448 or below."""
    rows = x.reshape(-1, x.shape[-1]).double()
    scales = torch.tensor([_scale(row.abs().max().item()) for row in rows], dtype=torch.float64)
    finite = scales.clamp(max=2.0**120)
    values = (rows / finite[:, None]).float().to(E4M3)
    return Quantized(values.view(x.shape), scales.float().view(x.shape[:-1]))


def columns_reference(x: Tensor) -> Quantized:
    """The transposed matrices, row by row."""
    return rows_reference(x.transpose(1, 2).contiguous())


def decoded(quantized: Quantized) -> Tensor:
    """The numbers that it stands for, in float64."""
    return quantized.values.double() * quantized.scales.double()[..., None]


def product_reference(rows: Quantized, weight: Quantized, offsets: Tensor) -> Tensor:
    """rows [tokens, inner] times each expert's weight [columns, inner], group by group, in float64."""
    tokens, matrices = decoded(rows), decoded(weight)
    parts, start = [], 0
    for matrix, end in zip(matrices, offsets.tolist(), strict=True):
        parts.append(tokens[start:end] @ matrix.T)
        start = end
    return torch.cat(parts)


@contextlib.contextmanager
def emulated() -> Iterator[list[tuple[torch.Size, torch.Size, bool]]]:
    """The references in the place of kernels that need a GPU: which products were taken, and whether with
    fast accumulation. torch's own checks of types, layouts, widths and scales are asked first, on tensors
    without data."""
    taken = []

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
        arguments = (rows, weight, row_scales, weight_scales, offs)
        torch._scaled_grouped_mm(*(one.to("meta") for one in arguments), out_dtype=torch.bfloat16)
        assert rows.shape[-1] % 16 == weight.shape[-1] % 16 == 0
        taken.append((rows.shape, weight.shape, use_fast_accum))
        factors = Quantized(rows, row_scales), Quantized(weight.transpose(1, 2), weight_scales)
        return product_reference(*factors, offs).bfloat16()

    with (
        mock.patch.object(fp8_grouped, "quantize_rows", rows_reference),
        mock.patch.object(fp8_grouped, "quantize_columns", columns_reference),
        mock.patch.object(fp8_grouped, "scaled_grouped_mm", product),
    ):
        yield taken


def _scale(largest: float) -> float:
    if math.isinf(largest):
        return math.inf
    mantissa, exponent = math.frexp(largest / LARGEST)
    step = exponent - 1 if mantissa == 0.5 else exponent
    return 2.0 ** max(step if largest else -126, -126)
