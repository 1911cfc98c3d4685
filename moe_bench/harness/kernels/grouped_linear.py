"""Linear layers of several experts at once, on torch.nn.functional.grouped_mm, without host synchronisation.

The tokens of a rank stand sorted by expert; `offsets[e]` is the end of expert e's rows. On Hopper and
Blackwell the BF16 kernel reads the offsets on the device.

Alignment. The kernel wants every row and column stride to be a multiple of 16 bytes (`check_alignment`). It
wants group sizes to be multiples of 16 bytes as well, 8 BF16 rows, wherever the dimension that the groups cut
is the contiguous one (torch, aten/src/ATen/native/cuda/GroupMMCommon.cuh; pytorch/pytorch#155466). None of
our three products is of that kind: output and input gradient cut row-major rows, and the weight gradient is
grad^T [out, tokens] times x [tokens, in], both cut along a dimension whose stride is a whole row. So groups
of any size, empty ones too, go in unpadded, provided that grad is row-major, which the backward passes see
to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.activation import GatedActivation

ALIGNMENT_BYTES = 16
"""Strides that TMA, Hopper's bulk copy, can address (CUDA Driver API, cuTensorMapEncodeTiled)."""


def group_offsets(tokens_per_expert: Tensor, device: torch.device) -> Tensor:
    """End of each expert's rows, int32 on `device`.

    The all-to-all dispatcher's counts are on the host; their copy is queued, not waited for.
    """
    counts = tokens_per_expert.to(device=device, non_blocking=True)
    return counts.cumsum(dim=0, dtype=torch.int32)


def membership(offsets: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """One-hot matrix [rows, experts] of each row's expert; rows after the last group belong to none.

    Bias rows are its product with the biases, which is exact, and its transpose sums their gradient in one
    GEMM: gathering would leave the backward pass to atomic additions of all rows onto a few.
    """
    row = torch.arange(num_rows, device=offsets.device)[:, None]
    starts = torch.cat([offsets.new_zeros(1), offsets[:-1]])
    return ((starts <= row) & (row < offsets)).to(dtype)


def grouped_linear(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """x [tokens, in] times each expert's weight [experts, out, in], transposed: [tokens, out]."""
    return _GroupedLinear.apply(x, weight, offsets)


def activated_grouped_linear(
    x: Tensor,
    probabilities: Tensor,
    weight: Tensor,
    offsets: Tensor,
    *,
    activation: GatedActivation,
    recompute: bool,
) -> Tensor:
    """Activate x [tokens, 2 * in], weight by the probabilities, then `grouped_linear`.

    Args:
        recompute: keep only x for the backward pass and activate again there, rather than keep the activated
            [tokens, in] too (Megatron-Core's recompute module `moe_act`).
    """
    return _ActivatedGroupedLinear.apply(x, probabilities, weight, offsets, activation, recompute)


def check_alignment(*, dtype: torch.dtype, **widths: int) -> None:
    """Refuse widths whose rows grouped_mm cannot address.

    Raises:
        MissingRequirementError: a row of that many elements is not a multiple of 16 bytes.
    """
    for name, width in widths.items():
        if width * dtype.itemsize % ALIGNMENT_BYTES != 0:
            raise MissingRequirementError(
                f"{name} {width} of {dtype}: grouped_mm needs rows of a multiple of {ALIGNMENT_BYTES} bytes; "
                f"choose a multiple of {ALIGNMENT_BYTES // dtype.itemsize}, or grouped_gemm: false"
            )


class _GroupedLinear(torch.autograd.Function):
    """grouped_mm with a gradient whose layouts are ours (see the module's docstring)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, offsets)
        return _output(x, weight, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offsets = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x = _input_gradient(grad, weight, offsets) if ctx.needs_input_grad[0] else None
        grad_weight = _weight_gradient(grad, x, weight, offsets) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, None


class _ActivatedGroupedLinear(torch.autograd.Function):
    """The activation and the product behind it, so that the activated tokens can be made twice or kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probabilities: Tensor,
        weight: Tensor,
        offsets: Tensor,
        activation: GatedActivation,
        recompute: bool,
    ) -> Tensor:
        hidden = activation.forward(x, probabilities)
        ctx.activation = activation
        ctx.save_for_backward(x, probabilities, weight, offsets, None if recompute else hidden)
        return _output(hidden, weight, offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, probabilities, weight, offsets, hidden = ctx.saved_tensors
        grad = grad.contiguous()
        if hidden is None:
            hidden = ctx.activation.forward(x, probabilities)
        grad_weight = _weight_gradient(grad, hidden, weight, offsets) if ctx.needs_input_grad[2] else None
        del hidden
        grad_hidden = _input_gradient(grad, weight, offsets)
        grad_x, grad_probabilities = ctx.activation.backward(grad_hidden, x, probabilities)
        return grad_x, grad_probabilities, grad_weight, None, None, None


def _output(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    return grouped_mm(x, weight.transpose(1, 2), offs=offsets)


def _input_gradient(grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if grad.shape[0] == 0:
        return grad.new_empty(0, weight.shape[2])
    return grouped_mm(grad, weight, offs=offsets)


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """[experts, out, in]; an expert without tokens gets zeros, so every parameter stays in the graph."""
    if grad.shape[0] == 0:
        return torch.zeros_like(weight)
    return grouped_mm(grad.t(), x, offs=offsets)
