"""Matrices as FP8 numbers with one scale per row, or per column and then transposed: two Triton kernels.

    scale  = 2^s, the least power of two with max |row| <= 448 scale
    values = e4m3(row / scale), rounded to nearest even

448 is the largest e4m3 number. Powers of two divide exactly, so that rounding to e4m3 is the only error;
torchao rounds its scales so too (torchao/prototype/moe_training/fp8_grouped_mm.py). s is read off the bits of
the maximum m 2^e, 1 <= m < 2: as 448 = 1.75 x 2^8, it is e - 8, one more where m > 1.75. It stays at least
-126, which keeps scales and their inverses normal numbers, for rows of zeros too. Infinity and NaN in a row
come out as infinity or NaN in the product: as the scale the one, as values the other.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

E4M3 = torch.float8_e4m3fn

_TILE_ROWS, _TILE_COLUMNS = 128, 64
"""Of the transposition: 128 bytes in a row of what is written, 128 bytes in a row of what is read."""
_WARP = 32
_ELEMENTS_PER_THREAD = 16
_MAX_WARPS = 16


class Quantized(NamedTuple):
    """A matrix or a stack of them as FP8."""

    values: Tensor
    """e4m3 [..., rows, columns], contiguous; a row times its scale is what it stands for."""
    scales: Tensor
    """FP32 [..., rows]."""


def quantize_rows(x: Tensor) -> Quantized:
    """x [..., rows, columns] with a scale for each row; copied first where it is not contiguous."""
    x = x.contiguous()
    columns = x.shape[-1]
    values = torch.empty_like(x, dtype=E4M3)
    scales = x.new_empty(x.shape[:-1], dtype=torch.float32)
    block = triton.next_power_of_2(columns)
    num_warps = max(1, min(_MAX_WARPS, block // (_WARP * _ELEMENTS_PER_THREAD)))
    _rows_kernel[(scales.numel(),)](
        x, values, scales, columns, block, num_warps=num_warps, enable_fp_fusion=True
    )
    return Quantized(values, scales)


def quantize_columns(x: Tensor) -> Quantized:
    """The transposes [matrices, columns, rows] of x [matrices, rows, columns], a scale for each column."""
    x = x.contiguous()
    matrices, rows, columns = x.shape
    values = x.new_empty((matrices, columns, rows), dtype=E4M3)
    scales = x.new_empty((matrices, columns), dtype=torch.float32)
    grid = (triton.cdiv(columns, _TILE_COLUMNS), matrices)
    _columns_kernel[grid](x, values, scales, rows, columns, _TILE_ROWS, _TILE_COLUMNS, enable_fp_fusion=True)
    return Quantized(values, scales)


@triton.jit
def _scale_step(largest: tl.tensor) -> tl.tensor:
    """s of the module's docstring."""
    bits = largest.to(tl.int32, bitcast=True)
    step = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).to(tl.int32)
    return tl.maximum(step, -126)


@triton.jit
def _power_of_two(exponent: tl.tensor) -> tl.tensor:
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _stored_scale(step: tl.tensor, largest: tl.tensor) -> tl.tensor:
    """2^step; infinity where the row holds one, since the conversion to e4m3 makes 448 of it."""
    return tl.where(largest == float("inf"), float("inf"), _power_of_two(step))


@triton.jit
def _rows_kernel(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    columns: tl.tensor,
    block: tl.constexpr,
) -> None:
    """One program per row, which it holds in registers."""
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, block)
    is_inside = channels < columns
    x = tl.load(x_ptr + row * columns + channels, mask=is_inside, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), axis=0)
    step = _scale_step(largest)
    tl.store(scales_ptr + row, _stored_scale(step, largest))
    values = (x * _power_of_two(-step)).to(values_ptr.dtype.element_ty)
    tl.store(values_ptr + row * columns + channels, values, mask=is_inside)


@triton.jit
def _columns_kernel(
    x_ptr: tl.tensor,
    values_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    rows: tl.tensor,
    columns: tl.tensor,
    tile_rows: tl.constexpr,
    tile_columns: tl.constexpr,
) -> None:
    """One program per strip of columns, read twice: for its maxima, and, from the L2 cache, to be written."""
    matrix = tl.program_id(1).to(tl.int64)
    channels = tl.program_id(0) * tile_columns + tl.arange(0, tile_columns)
    is_channel = channels < columns
    start = x_ptr + matrix * rows * columns
    largest = tl.zeros([tile_columns], dtype=tl.float32)
    for first in range(0, rows, tile_rows):
        at = first + tl.arange(0, tile_rows)
        is_inside = (at < rows)[:, None] & is_channel[None, :]
        x = tl.load(start + at[:, None] * columns + channels[None, :], mask=is_inside, other=0.0)
        largest = tl.maximum(largest, tl.max(tl.abs(x.to(tl.float32)), axis=0))
    step = _scale_step(largest)
    tl.store(scales_ptr + matrix * columns + channels, _stored_scale(step, largest), mask=is_channel)
    inverse = _power_of_two(-step)
    start_values = values_ptr + matrix * rows * columns
    for first in range(0, rows, tile_rows):
        at = first + tl.arange(0, tile_rows)
        is_inside = (at < rows)[:, None] & is_channel[None, :]
        x = tl.load(start + at[:, None] * columns + channels[None, :], mask=is_inside, other=0.0)
        values = (x.to(tl.float32) * inverse[None, :]).to(values_ptr.dtype.element_ty)
        to = start_values + channels[:, None].to(tl.int64) * rows + at[None, :]
        tl.store(to, tl.trans(values), mask=tl.trans(is_inside))
