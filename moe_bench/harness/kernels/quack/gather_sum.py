"""Each token's rows added up, weighted or not: the combine of arXiv:2512.14080, and the gradient of a gather.

    tokens[t] = sum over s of weights[row_of_slot[t, s]] * rows[row_of_slot[t, s]],  in FP32

Bytes: a H (R + t) for R rows and t tokens of H elements of a bytes; nothing of the rows' size is written.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gather_sum(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None) -> Tensor:
    """Add up.

    Args:
        rows: [rows, hidden].
        row_of_slot: int32 [tokens, K].
        weights: [rows], or None for ones.

    Returns:
        [tokens, hidden] of the rows' type.
    """
    if rows.is_cuda:
        from moe_bench.harness.kernels.quack.gather_sum_kernel import gather_sum_on_gpu

        return gather_sum_on_gpu(rows.contiguous(), row_of_slot, weights)
    return gather_sum_reference(rows, row_of_slot, weights)


def gather_sum_reference(rows: Tensor, row_of_slot: Tensor, weights: Tensor | None) -> Tensor:
    """`gather_sum` in plain torch."""
    num_tokens, num_slots = row_of_slot.shape
    place = row_of_slot.flatten()
    dtype = torch.promote_types(rows.dtype, torch.float32)
    copies = rows.index_select(0, place).to(dtype)
    if weights is not None:
        copies = copies * weights.index_select(0, place).to(dtype).unsqueeze(-1)
    return copies.view(num_tokens, num_slots, rows.shape[1]).sum(dim=1).to(rows.dtype)
