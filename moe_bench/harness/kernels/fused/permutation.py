"""Tokens to rows sorted by expert and back, with their probabilities, by a row map; gradients likewise.

    permute:    rows[map[t, s]] = tokens[t],  row_probabilities[map[t, s]] = probabilities[t, expert[t, s]]
    unpermute:  tokens[t] = sum over s of rows[map[t, s]], added in FP32

The gradient of each is the other one. A program has one token, so that in both directions every row and every
token crosses memory once: a H (t + R) bytes for t tokens, R rows of H elements of a bytes.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_bench.harness.kernels.fused.row_map import RowMap

BLOCK_H = 1024
"""Elements of a token per program: one 16-byte load per thread of four warps in BF16. Rows of the models here
are 2,048 to 7,168 elements, 2 to 7 whole blocks."""
NUM_WARPS = 4


def permute(
    tokens: Tensor, probabilities: Tensor, row_map: RowMap, *, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Copy each token to its rows: [num_rows, hidden], and their probabilities [num_rows].

    Args:
        tokens: [tokens, hidden].
        probabilities: [tokens, experts].
        num_rows: set entries of the routing map; the host has to know it.
    """
    return _Permute.apply(tokens, probabilities, row_map.slots, num_rows)


def unpermute(rows: Tensor, row_map: RowMap) -> Tensor:
    """Add each token's rows up: [tokens, hidden] of the rows' type."""
    return _Unpermute.apply(rows, row_map.slots)


class _Permute(torch.autograd.Function):
    """Keeps the row map alone."""

    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, probabilities: Tensor, slots: Tensor, num_rows: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(slots)
        ctx.num_experts = probabilities.shape[1]
        return _spread(tokens.contiguous(), probabilities.contiguous(), slots, num_rows)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor, grad_row_probabilities: Tensor) -> tuple[Tensor | None, ...]:
        (slots,) = ctx.saved_tensors
        grad_tokens = _gather(grad_rows.contiguous(), slots)
        grad_probabilities = grad_row_probabilities.new_zeros(slots.shape[0], ctx.num_experts)
        if slots.shape[0]:
            _probability_gradient_kernel[(triton.cdiv(slots.shape[0], 128),)](
                grad_row_probabilities.contiguous(),
                slots,
                grad_probabilities,
                slots.shape[0],
                ctx.num_experts,
                slots.shape[2],
                block_t=128,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        return grad_tokens, grad_probabilities, None, None


class _Unpermute(torch.autograd.Function):
    """Keeps the row map alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, slots: Tensor) -> Tensor:
        ctx.save_for_backward(slots)
        ctx.num_rows = rows.shape[0]
        return _gather(rows.contiguous(), slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (slots,) = ctx.saved_tensors
        return _spread(grad.contiguous(), None, slots, ctx.num_rows)[0], None


def _spread(
    tokens: Tensor, probabilities: Tensor | None, slots: Tensor, num_rows: int
) -> tuple[Tensor, Tensor]:
    num_tokens, hidden_size = tokens.shape
    rows = tokens.new_empty(num_rows, hidden_size)
    chosen = tokens if probabilities is None else probabilities
    row_probabilities = chosen.new_empty(0 if probabilities is None else num_rows)
    if num_tokens:
        _spread_kernel[(num_tokens, triton.cdiv(hidden_size, BLOCK_H))](
            tokens,
            chosen,
            slots,
            rows,
            row_probabilities,
            hidden_size,
            chosen.shape[1],
            slots.shape[2],
            has_probabilities=probabilities is not None,
            block_h=BLOCK_H,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return rows, row_probabilities


def _gather(rows: Tensor, slots: Tensor) -> Tensor:
    num_tokens, hidden_size = slots.shape[0], rows.shape[1]
    tokens = rows.new_empty(num_tokens, hidden_size)
    if num_tokens:
        _gather_kernel[(num_tokens, triton.cdiv(hidden_size, BLOCK_H))](
            rows,
            slots,
            tokens,
            hidden_size,
            slots.shape[2],
            block_h=BLOCK_H,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return tokens


@triton.jit
def _spread_kernel(
    tokens_ptr: tl.tensor,
    probabilities_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    row_probabilities_ptr: tl.tensor,
    hidden_size: tl.tensor,
    num_experts: tl.tensor,
    num_slots: tl.tensor,
    has_probabilities: tl.constexpr,
    block_h: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * block_h + tl.arange(0, block_h)
    is_inside = channels < hidden_size
    values = tl.load(tokens_ptr + token * hidden_size + channels, mask=is_inside)
    first = slots_ptr + token * 2 * num_slots
    for slot in range(num_slots):
        row = tl.load(first + slot).to(tl.int64)
        if row >= 0:
            tl.store(rows_ptr + row * hidden_size + channels, values, mask=is_inside)
            if has_probabilities and tl.program_id(1) == 0:
                expert = tl.load(first + num_slots + slot)
                probability = tl.load(probabilities_ptr + token * num_experts + expert)
                tl.store(row_probabilities_ptr + row, probability)


@triton.jit
def _gather_kernel(
    rows_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    tokens_ptr: tl.tensor,
    hidden_size: tl.tensor,
    num_slots: tl.tensor,
    block_h: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * block_h + tl.arange(0, block_h)
    first = slots_ptr + token * 2 * num_slots
    total = tl.zeros([block_h], tl.float64 if rows_ptr.dtype.element_ty == tl.float64 else tl.float32)
    for slot in range(num_slots):
        row = tl.load(first + slot).to(tl.int64)
        # A mask instead of a branch: the loads of all slots are under way together.
        num_channels = tl.where(row >= 0, hidden_size, 0)
        values = tl.load(rows_ptr + row * hidden_size + channels, mask=channels < num_channels, other=0.0)
        total += values.to(total.dtype)
    place = tokens_ptr + token * hidden_size + channels
    tl.store(place, total.to(tokens_ptr.dtype.element_ty), mask=channels < hidden_size)


@triton.jit
def _probability_gradient_kernel(
    grad_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    out_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    num_slots: tl.tensor,
    block_t: tl.constexpr,
) -> None:
    tokens = tl.program_id(0).to(tl.int64) * block_t + tl.arange(0, block_t)
    is_token = tokens < num_tokens
    first = slots_ptr + tokens * 2 * num_slots
    for slot in range(num_slots):
        rows = tl.load(first + slot, mask=is_token, other=-1)
        is_used = rows >= 0
        experts = tl.load(first + num_slots + slot, mask=is_used, other=0)
        grads = tl.load(grad_ptr + rows, mask=is_used, other=0.0)
        tl.store(out_ptr + tokens * num_experts + experts, grads, mask=is_used)
