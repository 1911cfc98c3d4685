"""Forward and backward of SwiGLU experts as arXiv:2512.14080 orders them: little is kept, little is moved.

    z = x[token] W1,  h = silu(gate) linear,  y = h W2,  o[t] = sum over the token's rows of p y

For the backward pass stay x, which nobody copied, z and p. Backward reads the gathered gradient do once for
dz, dp and p h:

    dh = do[token] W2,  dp = sum(h dh),  dz from p dh and z,  dW2 = do[token]^T (p h),
    dx[t] = sum over the token's rows of dz W1,  dW1 = x[token]^T dz

so neither y nor h is kept for dp, and probabilities weight the output, not the activation (Megatron-Core's
own experts weight the activation: the same sum, rounded elsewhere).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.quack import products
from moe_bench.harness.kernels.quack.gather_sum import gather_sum
from moe_bench.harness.kernels.quack.rows import ExpertRows
from moe_bench.harness.ranges import range_named


def gathered_experts(
    x: Tensor,
    probabilities: Tensor,
    up: Tensor,
    down: Tensor,
    rows: ExpertRows,
    *,
    accumulates: bool = False,
) -> Tensor:
    """Run the experts and add up each token's rows.

    Args:
        x: [tokens, H].
        probabilities: [rows].
        up: [experts, 2 F, H], gate first.
        down: [experts, H, F].
        accumulates: whether the products add the weights' gradients to their `main_grad`, as Megatron-Core's
            linear layers do with `gradient_accumulation_fusion`.

    Returns:
        [tokens, H].

    Raises:
        MissingRequirementError: `accumulates`, and a weight has no `main_grad`.
    """
    up_grad, down_grad = (_buffer_of(weight) if accumulates else None for weight in (up, down))
    pre_activation, activated = _Up.apply(x, up, up_grad, rows)
    return _Down.apply(pre_activation, activated, probabilities, down, down_grad, rows)


class _Up(torch.autograd.Function):
    """The first product and the activation in its epilogue; keeps x."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, main_grad: Tensor | None, rows: ExpertRows
    ) -> tuple[Tensor, Tensor]:
        x = x.contiguous()
        _keep(ctx, rows, x, weight)
        ctx.main_grad = main_grad
        with range_named("fc1 fwd"):
            pre_activation, activated = products.up(x, weight, rows)
        # Its gradient comes through the pre-activation.
        ctx.mark_non_differentiable(activated)
        ctx.set_materialize_grads(False)
        return pre_activation, activated

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        rows, (x, weight) = _kept(ctx)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            with range_named("fc1 dgrad"):
                grad_rows = products.up_input_gradient(grad, weight, rows)
            with range_named("permute bwd"):
                is_as_it_came = rows.token_of_row is None
                grad_x = grad_rows if is_as_it_came else gather_sum(grad_rows, rows.row_of_slot, None)
            del grad_rows
        if ctx.needs_input_grad[1]:
            into, grad_weight = _gradient_of(ctx, weight)
            with range_named("fc1 wgrad"):
                products.up_weight_gradient(x, grad, rows, into)
        return grad_x, grad_weight, None, None


class _Down(torch.autograd.Function):
    """The second product and the weighted sum; keeps the pre-activation and the probabilities."""

    @staticmethod
    def forward(
        ctx: Any,
        pre_activation: Tensor,
        activated: Tensor,
        probabilities: Tensor,
        weight: Tensor,
        main_grad: Tensor | None,
        rows: ExpertRows,
    ) -> Tensor:
        _keep(ctx, rows, pre_activation, probabilities, weight)
        ctx.main_grad = main_grad
        with range_named("fc2 fwd"):
            y = products.down(activated, weight, rows)
        with range_named("unpermute fwd"):
            return gather_sum(y, rows.row_of_slot, probabilities)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, (pre_activation, probabilities, weight) = _kept(ctx)
        grad = grad.contiguous()
        with range_named("fc2 dgrad"):
            grad_pre, weighted, grad_probabilities = products.down_gradient(
                grad, weight, pre_activation, probabilities.float(), rows
            )
        into, grad_weight = _gradient_of(ctx, weight)
        with range_named("fc2 wgrad"):
            products.down_weight_gradient(grad, weighted, rows, into)
        return grad_pre, None, grad_probabilities.to(probabilities.dtype), grad_weight, None, None


def _buffer_of(weight: Tensor) -> Tensor:
    buffer = getattr(weight, "main_grad", None)
    if buffer is None:
        raise MissingRequirementError(
            "kernels.fusions.gradient_accumulation: the experts' weights have no main_grad to add to; "
            "wrap the model in DistributedDataParallel, or set it to false"
        )
    return buffer


def _keep(ctx: Any, rows: ExpertRows, *tensors: Tensor) -> None:
    ctx.save_for_backward(*rows.tensors, *tensors)
    ctx.rows = replace(rows, starts=None, token_of_row=None, row_of_slot=None)


def _kept(ctx: Any) -> tuple[ExpertRows, tuple[Tensor, ...]]:
    starts, token_of_row, row_of_slot, *tensors = ctx.saved_tensors
    rows = replace(ctx.rows, starts=starts, token_of_row=token_of_row, row_of_slot=row_of_slot)
    return rows, tuple(tensors)


def _gradient_of(ctx: Any, weight: Tensor) -> tuple[products.Gradient, Tensor]:
    """Where the weight's gradient goes, and what autograd is handed.

    A gradient that is added to the buffer is announced as Megatron-Core's linear layers do; what autograd
    gets in its place is never read (tensor_parallel/layers.py:692).
    """
    if ctx.main_grad is None:
        gradient = torch.empty_like(weight)
        return products.Gradient(tensor=gradient, accumulates=False), gradient
    weight.grad_added_to_main_grad = True
    return products.Gradient(tensor=ctx.main_grad, accumulates=True), torch.empty_like(weight)
