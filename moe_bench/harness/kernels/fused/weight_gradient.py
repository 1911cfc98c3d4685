"""The experts' weight gradients added to the gradient buffer inside the product that makes them.

    main_grad[e] += grad[rows of e]^T x[rows of e]

torch's grouped_mm writes BF16 and cannot add (torch 2.15, aten/src/ATen/native/cuda/GroupedBlas.cpp): its
gradient is written (2 bytes an element), read again (2) and added to the FP32 buffer (4 + 4): 12 bytes and
one rounding to BF16, and a kernel of ours for that addition would move them too. Adding in the product's
epilogue moves 8 and rounds nothing, so the product itself is ours. It pays where that product is not slower
by more than is saved: for DeepSeek-V3's experts with 8,192 rows each that is about 5 % of its time.

One program makes one tile of one expert's gradient. The expert's rows are the inner dimension; they come by
TMA, whose boxes may begin at any row, and of the last box the next expert's rows are masked, so that groups
need no padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True, slots=True, kw_only=True)
class TileShape:
    """How a product is cut into programs."""

    rows: int
    outputs: int
    inputs: int
    band: int
    """Tiles along the outputs that neighbouring programs share, for the second-level cache."""
    num_warps: int
    num_stages: int


HOPPER = TileShape(rows=64, outputs=128, inputs=128, band=16, num_warps=8, num_stages=3)
"""ptxas gives a thread 123 registers for this shape on sm_90, and three stages take 96 KiB: two programs
share an SM, and one reads and writes its 64 KiB of the buffer while the other multiplies. 128 x 256 has more
reuse, but fills an SM alone. 264 programs in bands of 16 tiles read 16 + 17 blocks of columns at a time."""


def accumulate_weight_gradient(
    main_grad: Tensor, grad: Tensor, x: Tensor, offsets: Tensor, *, tile: TileShape = HOPPER
) -> None:
    """Add every expert's weight gradient to `main_grad` in place.

    Args:
        main_grad: [experts, out, in], contiguous; FP32, or BF16 where gradients are kept so.
        grad: [tokens, out], contiguous, sorted by expert.
        x: [tokens, in], likewise.
        offsets: int32 [experts], the end of each expert's rows, on the device.
    """
    num_experts, out_features, in_features = main_grad.shape
    if grad.shape[0] == 0:
        return
    num_tiles = triton.cdiv(out_features, tile.outputs) * triton.cdiv(in_features, tile.inputs)
    _accumulate_kernel[(num_experts * num_tiles,)](
        TensorDescriptor.from_tensor(grad, [tile.rows, tile.outputs]),
        TensorDescriptor.from_tensor(x, [tile.rows, tile.inputs]),
        main_grad,
        offsets,
        out_features,
        in_features,
        block_k=tile.rows,
        block_m=tile.outputs,
        block_n=tile.inputs,
        band=tile.band,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        enable_fp_fusion=True,
    )


@triton.jit
def _tile(tiles_m: tl.tensor, tiles_n: tl.tensor, band: tl.constexpr) -> Any:
    """Expert and place of this program's tile: bands of tiles along the outputs, column by column."""
    tile = tl.program_id(0)
    expert = tile // (tiles_m * tiles_n)
    within = tile % (tiles_m * tiles_n)
    first = within // (band * tiles_n) * band
    height = min(tiles_m - first, band)
    within = within % (band * tiles_n)
    return expert, first + within % height, within // height


@triton.jit
def _halves(total: tl.tensor, rows: tl.constexpr, columns: tl.constexpr) -> Any:
    """Its left and its right columns."""
    return tl.split(tl.permute(tl.reshape(total, [rows, 2, columns // 2]), [0, 2, 1]))


@triton.jit
def _add(
    own_ptr: tl.tensor,
    total: tl.tensor,
    first_m: tl.tensor,
    first_n: tl.tensor,
    out_features: tl.tensor,
    in_features: tl.tensor,
    rows: tl.constexpr,
    columns: tl.constexpr,
) -> None:
    m = first_m + tl.arange(0, rows)
    n = first_n + tl.arange(0, columns)
    places = own_ptr + m[:, None] * in_features + n[None, :]
    is_inside = (m < out_features)[:, None] & (n < in_features)[None, :]
    before = tl.load(places, mask=is_inside)
    tl.store(places, (before.to(tl.float32) + total).to(before.dtype), mask=is_inside)


@triton.jit
def _accumulate_kernel(
    grad_boxes: tl.tensor,
    x_boxes: tl.tensor,
    main_grad_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    out_features: tl.tensor,
    in_features: tl.tensor,
    block_k: tl.constexpr,
    block_m: tl.constexpr,
    block_n: tl.constexpr,
    band: tl.constexpr,
) -> None:
    expert, tile_m, tile_n = _tile(tl.cdiv(out_features, block_m), tl.cdiv(in_features, block_n), band)
    start = tl.load(offsets_ptr + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets_ptr + expert)
    if end > start:
        first_m, first_n = tile_m * block_m, tile_n * block_n
        total = tl.zeros([block_m, block_n], tl.float32)
        whole = start + (end - start) // block_k * block_k
        for row in tl.range(start, whole, block_k):
            grad = grad_boxes.load([row, first_m])
            x = x_boxes.load([row, first_n])
            total = tl.dot(grad.T, x, total, input_precision="ieee")
        if whole < end:
            is_row = (whole + tl.arange(0, block_k) < end)[:, None]
            grad = tl.where(is_row, grad_boxes.load([whole, first_m]), 0.0)
            x = tl.where(is_row, x_boxes.load([whole, first_n]), 0.0)
            total = tl.dot(grad.T, x, total, input_precision="ieee")
        own = main_grad_ptr + expert.to(tl.int64) * out_features * in_features
        # In quarters: a thread has no registers for a whole tile of the buffer beside its own.
        half: tl.constexpr = block_n // 2
        quarter: tl.constexpr = block_n // 4
        for side in tl.static_range(2):
            left, right = _halves(total, block_m, block_n)
            first, second = _halves(left if side == 0 else right, block_m, half)
            n = first_n + side * half
            _add(own, first, first_m, n, out_features, in_features, block_m, quarter)
            _add(own, second, first_m, n + quarter, out_features, in_features, block_m, quarter)
