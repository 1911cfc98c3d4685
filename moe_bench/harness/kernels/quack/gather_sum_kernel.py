"""The Triton kernel of `gather_sum`: one program per token and block of channels."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_H = 1024
"""Elements of a token per program: one 16-byte load for each thread of four warps in BF16."""
NUM_WARPS = 4


def gather_sum_on_gpu(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None) -> Tensor:
    """See `gather_sum.gather_sum`; `rows` and `row_of_slot` are contiguous."""
    num_tokens, num_slots = row_of_slot.shape
    hidden_size = rows.shape[1]
    tokens = rows.new_empty(num_tokens, hidden_size)
    if tokens.numel():
        _gather_sum_kernel[(num_tokens, triton.cdiv(hidden_size, BLOCK_H))](
            rows,
            row_of_slot,
            rows if weights is None else weights.contiguous(),
            tokens,
            hidden_size,
            num_slots=num_slots,
            has_weights=weights is not None,
            sum_type=tl.float64 if rows.dtype == torch.float64 else tl.float32,
            block_h=BLOCK_H,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return tokens


@triton.jit
def _gather_sum_kernel(
    rows_ptr: tl.tensor,
    row_of_slot_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    hidden_size: tl.tensor,
    num_slots: tl.constexpr,
    has_weights: tl.constexpr,
    sum_type: tl.constexpr,
    block_h: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * block_h + tl.arange(0, block_h)
    is_inside = channels < hidden_size
    total = tl.zeros([block_h], sum_type)
    for slot in tl.static_range(num_slots):
        row = tl.load(row_of_slot_ptr + token * num_slots + slot).to(tl.int64)
        values = tl.load(rows_ptr + row * hidden_size + channels, mask=is_inside, other=0.0).to(sum_type)
        if has_weights:
            values *= tl.load(weights_ptr + row).to(sum_type)
        total += values
    place = tokens_ptr + token * hidden_size + channels
    tl.store(place, total.to(tokens_ptr.dtype.element_ty), mask=is_inside)
