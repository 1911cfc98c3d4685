"""Linear layers of several experts at once, on torch.nn.functional.grouped_mm, without host synchronisation.

The tokens of a rank stand sorted by expert; `offsets[e]` is the end of expert e's rows. On Hopper and
Blackwell the BF16 kernel reads the offsets on the device.

Alignment. The kernel wants every row and column stride to be a multiple of 16 bytes (`PlainProducts`). It
wants group sizes to be multiples of 16 bytes as well, 8 BF16 rows, wherever the dimension that the groups
cut is the contiguous one (torch, aten/src/ATen/native/cuda/GroupMMCommon.cuh; pytorch/pytorch#155466). None
of our three products is of that kind: output and input gradient cut row-major rows, and the weight gradient
is grad^T [out, tokens] times x [tokens, in], both cut along a dimension whose stride is a whole row. So
groups of any size, empty ones too, go in unpadded, provided that grad is row-major, which the backward
passes see to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.activation import ExpertActivation
from moe_bench.harness.ranges import range_named

ALIGNMENT_BYTES = 16
"""Strides that TMA, Hopper's bulk copy, can address (CUDA Driver API, cuTensorMapEncodeTiled)."""


Accumulate = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Adds to main_grad [experts, out, in] the weight gradients of grad [tokens, out] and x [tokens, in], whose
rows end at offsets [experts]."""


class Products(Protocol):
    """How tokens meet the experts' weights, forward and back; weight gradients are always plain."""

    implementation: str
    """As a record names it."""

    def check_widths(self, *, dtype: torch.dtype, **widths: int) -> None:
        """Raise MissingRequirementError, naming one of `widths`, for weights that cannot be multiplied so."""

    def of_stack(self, *, are_apart: bool) -> Products:
        """Those of one stack of weights, which may keep forms of it; `are_apart` as in `ExpertStack`."""

    def output(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """x [tokens, in] and weight [experts, out, in] to [tokens, out]."""

    def input_gradient(self, grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """grad [tokens, out] and weight [experts, out, in] to [tokens, in]."""


class PlainProducts:
    """grouped_mm in the type of the tokens."""

    implementation = "torch:grouped_mm"

    def check_widths(self, *, dtype: torch.dtype, **widths: int) -> None:
        """Raise MissingRequirementError where a row of so many elements is no multiple of 16 bytes."""
        for name, width in widths.items():
            if width * dtype.itemsize % ALIGNMENT_BYTES != 0:
                raise MissingRequirementError(
                    f"{name} {width} of {dtype}: grouped_mm needs rows of a multiple of {ALIGNMENT_BYTES} "
                    f"bytes; choose a multiple of {ALIGNMENT_BYTES // dtype.itemsize}, or grouped_gemm: false"
                )

    def of_stack(self, *, are_apart: bool) -> Products:
        """These: nothing is kept."""
        del are_apart
        return self

    def output(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """x [tokens, in] and weight [experts, out, in] to [tokens, out]."""
        return grouped_mm(x, weight.transpose(1, 2), offs=offsets)

    def input_gradient(self, grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """grad [tokens, out] and weight [experts, out, in] to [tokens, in]."""
        return grouped_mm(grad, weight, offs=offsets)


PLAIN = PlainProducts()


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


def grouped_linear(
    x: Tensor,
    weights: Sequence[Tensor],
    offsets: Tensor,
    products: Products = PLAIN,
    accumulate: Accumulate | None = None,
) -> Tensor:
    """x [tokens, in] times each expert's weight, transposed: [tokens, out].

    Args:
        weights: all experts in one tensor [experts, out, in], or a matrix [out, in] for each.
        accumulate: adds the weight gradient to the weight's `main_grad` (Megatron-Core's
            gradient_accumulation_fusion); the one tensor of weights has to have it in the backward pass.
    """
    return _GroupedLinear.apply(x, offsets, products, accumulate, *weights)


def activated_grouped_linear(
    x: Tensor,
    probabilities: Tensor,
    weights: Sequence[Tensor],
    offsets: Tensor,
    *,
    activation: ExpertActivation,
    recompute: bool,
    products: Products = PLAIN,
    accumulate: Accumulate | None = None,
) -> Tensor:
    """Activate x [tokens, 2 * in], or [tokens, in] without a gate, weight by the probabilities, and project.

    Args:
        recompute: keep only x for the backward pass and activate again there, rather than keep the activated
            [tokens, in] too (Megatron-Core's recompute module `moe_act`).
        accumulate: as in `grouped_linear`.
    """
    return _ActivatedGroupedLinear.apply(
        x, probabilities, offsets, activation, recompute, products, accumulate, *weights
    )


def stacked(weights: Sequence[Tensor]) -> Tensor:
    """[experts, out, in], which the kernel wants, of one such tensor or of a matrix for each expert.

    No copy where the matrices follow one another in memory, as they do in the buffer that Megatron-FSDP
    gathers a layer's experts into. Elsewhere they are copied: experts x out x in elements read and written,
    in the forward and again in the backward pass.
    """
    first = weights[0]
    if first.dim() == 3:
        return first
    size, start = first.numel(), first.storage_offset()
    storage = first.untyped_storage()._cdata
    for index, weight in enumerate(weights):
        is_next = weight.storage_offset() == start + index * size and weight.is_contiguous()
        if not is_next or weight.untyped_storage()._cdata != storage:
            return torch.stack(tuple(weights))
    return first.as_strided((len(weights), *first.shape), (size, *first.stride()))


class _GroupedLinear(torch.autograd.Function):
    """grouped_mm with a gradient whose layouts are ours (see the module's docstring)."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        offsets: Tensor,
        products: Products,
        accumulate: Accumulate | None,
        *weights: Tensor,
    ) -> Tensor:
        ctx.products, ctx.accumulate = products, accumulate
        ctx.save_for_backward(x, offsets, *weights)
        return _output(products, x, stacked(weights), offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, offsets, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        weight = stacked(weights)
        grad_x = _input_gradient(ctx.products, grad, weight, offsets) if ctx.needs_input_grad[0] else None
        grad_weights = _weight_gradients(ctx, weights, grad, x, offsets)
        return grad_x, None, None, None, *grad_weights


class _ActivatedGroupedLinear(torch.autograd.Function):
    """The activation and the product behind it, so that the activated tokens can be made twice or kept."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        probabilities: Tensor,
        offsets: Tensor,
        activation: ExpertActivation,
        recompute: bool,
        products: Products,
        accumulate: Accumulate | None,
        *weights: Tensor,
    ) -> Tensor:
        with range_named("activation fwd"):
            hidden = activation.forward(x, probabilities)
        ctx.activation, ctx.products, ctx.accumulate = activation, products, accumulate
        ctx.save_for_backward(x, probabilities, offsets, None if recompute else hidden, *weights)
        return _output(products, hidden, stacked(weights), offsets)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, probabilities, offsets, hidden, *weights = ctx.saved_tensors
        grad = grad.contiguous()
        weight = stacked(weights)
        if hidden is None:
            with range_named("activation bwd"):
                hidden = ctx.activation.forward(x, probabilities)
        grad_weights = _weight_gradients(ctx, weights, grad, hidden, offsets)
        del hidden
        grad_hidden = _input_gradient(ctx.products, grad, weight, offsets)
        with range_named("activation bwd"):
            grad_x, grad_probabilities = ctx.activation.backward(grad_hidden, x, probabilities)
        return grad_x, grad_probabilities, None, None, None, None, None, *grad_weights


def _output(products: Products, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[1])
    return products.output(x, weight, offsets)


def _input_gradient(products: Products, grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    if grad.shape[0] == 0:
        return grad.new_empty(0, weight.shape[2])
    with range_named("dgrad"):
        return products.input_gradient(grad, weight, offsets)


def _weight_gradients(
    ctx: Any, weights: Sequence[Tensor], grad: Tensor, x: Tensor, offsets: Tensor
) -> tuple[Tensor | None, ...]:
    """One for each of `weights`, which stand last among the inputs; views of one tensor where they are many.

    An expert without tokens gets zeros, so every parameter stays in the graph.
    """
    if not any(ctx.needs_input_grad[-len(weights) :]):
        return (None,) * len(weights)
    if ctx.accumulate is not None:
        return (_added_to_main_grad(ctx.accumulate, weights[0], grad, x, offsets),)
    if grad.shape[0] == 0:
        return tuple(torch.zeros_like(weight) for weight in weights)
    with range_named("wgrad"):
        whole = grouped_mm(grad.t(), x, offs=offsets)
    return (whole,) if weights[0].dim() == 3 else whole.unbind(0)


def _added_to_main_grad(
    accumulate: Accumulate, weight: Tensor, grad: Tensor, x: Tensor, offsets: Tensor
) -> Tensor:
    """Add the gradient where data parallelism wants it, and return a tensor that nobody reads.

    The contract of Megatron-Core's own linear layers (tensor_parallel/layers.py:692): the hooks of
    DistributedDataParallel run when autograd hands the parameter something on its device, and leave out what
    `grad_added_to_main_grad` marks.
    """
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        raise MissingRequirementError(
            "kernels.fusions.gradient_accumulation: the experts' weights have no main_grad to add to; "
            "wrap the model in DistributedDataParallel, or set it to false"
        )
    with range_named("wgrad"):
        accumulate(main_grad, grad, x, offsets)
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)
