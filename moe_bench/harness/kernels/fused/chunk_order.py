"""Rows that arrive sorted by sender and local expert, put in the order of local experts, and back.

    forward:  sorted[r] = received[source[r]],  back: received[source[r]] = sorted[r]

`counts[sender, expert]` rows arrive for each local expert from each sender, senders outside; the experts want
them outside. The map of sources is made from the counts on the device, once for both ways and both gradients:
4 R bytes written, against 2 a R H that each way must move.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_R = 32
BLOCK_H = 1024
NUM_WARPS = 4


def source_rows(counts: Tensor, *, num_rows: int, device: torch.device) -> Tensor:
    """For each row in the order of (expert, sender), where it arrived in the order of (sender, expert).

    Args:
        counts: [senders, local experts].
        num_rows: their sum; the host knows it from the rows that arrived.
        device: where the rows are.

    Returns:
        int32 [num_rows].
    """
    num_senders, num_experts = counts.shape
    counts = counts.to(device, non_blocking=True)
    sources = torch.empty(num_rows, dtype=torch.int32, device=device)
    ends_as_sent = counts.flatten().cumsum(dim=0, dtype=torch.int32)
    ends_as_sorted = counts.t().flatten().cumsum(dim=0, dtype=torch.int32)
    if num_rows:
        _source_kernel[(triton.cdiv(num_rows, BLOCK_R),)](
            ends_as_sent,
            ends_as_sorted,
            sources,
            num_rows,
            num_senders,
            num_experts,
            block_r=BLOCK_R,
            block_c=triton.next_power_of_2(num_senders * num_experts),
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return sources


def sort_rows(rows: Tensor, probabilities: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [rows, hidden] and probabilities [rows] in the order of `source_rows`."""
    return _Sort.apply(rows, probabilities, sources)


def unsort_rows(rows: Tensor, sources: Tensor) -> Tensor:
    """Undo `sort_rows`."""
    return _Unsort.apply(rows, sources)


class _Sort(torch.autograd.Function):
    """Keeps the map alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, probabilities: Tensor, sources: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(sources)
        return _moved(rows, probabilities, sources, is_inverse=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_probabilities: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_moved(grad, grad_probabilities, *ctx.saved_tensors, is_inverse=True), None


class _Unsort(torch.autograd.Function):
    """Keeps the map alone."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(sources)
        return _moved(rows, None, sources, is_inverse=True)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _moved(grad, None, *ctx.saved_tensors, is_inverse=False)[0], None


def _moved(
    rows: Tensor, probabilities: Tensor | None, sources: Tensor, *, is_inverse: bool
) -> tuple[Tensor, Tensor]:
    num_rows, hidden_size = rows.shape
    rows = rows.contiguous()
    beside = rows.new_empty(0) if probabilities is None else probabilities.contiguous()
    moved, moved_beside = torch.empty_like(rows), torch.empty_like(beside)
    if num_rows:
        _move_kernel[(num_rows, triton.cdiv(hidden_size, BLOCK_H))](
            rows,
            beside,
            sources,
            moved,
            moved_beside,
            hidden_size,
            is_inverse=is_inverse,
            has_probabilities=probabilities is not None,
            block_h=BLOCK_H,
            num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )
    return moved, moved_beside


@triton.jit
def _source_kernel(
    ends_as_sent_ptr: tl.tensor,
    ends_as_sorted_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    num_rows: tl.tensor,
    num_senders: tl.tensor,
    num_experts: tl.tensor,
    block_r: tl.constexpr,
    block_c: tl.constexpr,
) -> None:
    rows = tl.program_id(0) * block_r + tl.arange(0, block_r)
    is_row = rows < num_rows
    chunks = tl.arange(0, block_c)
    ends = tl.load(ends_as_sorted_ptr + chunks, mask=chunks < num_senders * num_experts, other=2**31 - 1)
    chunk = tl.sum((ends[None, :] <= rows[:, None]).to(tl.int32), axis=1)
    as_sent = (chunk % num_senders) * num_experts + chunk // num_senders
    # A chunk is as long in both orders, so a row is as far from its end.
    from_end = tl.load(ends_as_sorted_ptr + chunk, mask=is_row, other=0) - rows
    source = tl.load(ends_as_sent_ptr + as_sent, mask=is_row, other=0) - from_end
    tl.store(sources_ptr + rows, source, mask=is_row)


@triton.jit
def _move_kernel(
    rows_ptr: tl.tensor,
    probabilities_ptr: tl.tensor,
    sources_ptr: tl.tensor,
    moved_ptr: tl.tensor,
    moved_probabilities_ptr: tl.tensor,
    hidden_size: tl.tensor,
    is_inverse: tl.constexpr,
    has_probabilities: tl.constexpr,
    block_h: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(sources_ptr + row).to(tl.int64)
    channels = tl.program_id(1) * block_h + tl.arange(0, block_h)
    is_inside = channels < hidden_size
    read, write = source, row
    if is_inverse:
        read, write = row, source
    values = tl.load(rows_ptr + read * hidden_size + channels, mask=is_inside)
    tl.store(moved_ptr + write * hidden_size + channels, values, mask=is_inside)
    if has_probabilities and tl.program_id(1) == 0:
        tl.store(moved_probabilities_ptr + write, tl.load(probabilities_ptr + read))
