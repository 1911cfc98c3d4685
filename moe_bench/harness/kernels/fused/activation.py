"""The experts' gated activation and its gradient, one Triton kernel each.

The equation is that of `moe_bench.harness.kernels.activation`. Nothing is compiled anew for another number
of tokens. For T rows of F elements of a bytes: 3 a T F forward, 5 a T F backward, and 4 T each for
probabilities and their gradients.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_bench.harness.kernels.activation import GatedActivation

BLOCK_F = 1024
"""Elements of a row at a time: one 16-byte load per thread of four warps in BF16."""
NUM_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonGatedActivation(GatedActivation):
    """The same activation on our kernels."""

    @classmethod
    def of(cls, activation: GatedActivation) -> GatedActivation:
        """The activation that has these numbers."""
        return cls(alpha=activation.alpha, offset=activation.offset, clamp=activation.clamp)

    def forward(self, x: Tensor, probabilities: Tensor) -> Tensor:
        """Activate x [tokens, 2 * ffn] with probabilities [tokens]: [tokens, ffn] of x's type."""
        num_rows, ffn = x.shape[0], x.shape[1] // 2
        y = x.new_empty(num_rows, ffn)
        if num_rows:
            block = min(BLOCK_F, triton.next_power_of_2(ffn))
            _forward_kernel[(num_rows, triton.cdiv(ffn, block))](
                x.contiguous(),
                probabilities.contiguous(),
                y,
                ffn,
                alpha=self.alpha,
                offset=self.offset,
                clamp=self.clamp,
                block=block,
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        return y

    def backward(self, grad: Tensor, x: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of x and of the probabilities, from the gradient of the output [tokens, ffn]."""
        num_rows, ffn = grad.shape
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_probabilities = torch.empty_like(probabilities, memory_format=torch.contiguous_format)
        if num_rows:
            _backward_kernel[(num_rows,)](
                grad.contiguous(),
                x.contiguous(),
                probabilities.contiguous(),
                grad_x,
                grad_probabilities,
                ffn,
                alpha=self.alpha,
                offset=self.offset,
                clamp=self.clamp,
                block=min(BLOCK_F, triton.next_power_of_2(ffn)),
                num_warps=NUM_WARPS,
                enable_fp_fusion=True,
            )
        return grad_x, grad_probabilities


@triton.jit
def _wide(values: tl.tensor) -> tl.tensor:
    return values if values.dtype == tl.float64 else values.to(tl.float32)


@triton.jit
def _clamped_above(values: tl.tensor, clamp: tl.constexpr) -> tl.tensor:
    """By comparisons that are false of NaN, which so goes through."""
    return values if clamp is None else tl.where(values > clamp, clamp, values)


@triton.jit
def _clamped(values: tl.tensor, clamp: tl.constexpr) -> tl.tensor:
    """On both sides, likewise."""
    return values if clamp is None else _clamped_above(tl.where(values < -clamp, -clamp, values), clamp)


@triton.jit
def _forward_kernel(
    x_ptr: tl.tensor,
    probabilities_ptr: tl.tensor,
    y_ptr: tl.tensor,
    ffn: tl.tensor,
    alpha: tl.constexpr,
    offset: tl.constexpr,
    clamp: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    is_inside = columns < ffn
    gate = _wide(tl.load(x_ptr + row * 2 * ffn + columns, mask=is_inside, other=0.0))
    linear = _wide(tl.load(x_ptr + row * 2 * ffn + ffn + columns, mask=is_inside, other=0.0))
    gate, linear = _clamped_above(gate, clamp), _clamped(linear, clamp)
    weight = tl.load(probabilities_ptr + row).to(gate.dtype)
    y = gate / (1 + tl.exp(-alpha * gate)) * (linear + offset) * weight
    tl.store(y_ptr + row * ffn + columns, y.to(y_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _backward_kernel(
    grad_ptr: tl.tensor,
    x_ptr: tl.tensor,
    probabilities_ptr: tl.tensor,
    grad_x_ptr: tl.tensor,
    grad_probabilities_ptr: tl.tensor,
    ffn: tl.tensor,
    alpha: tl.constexpr,
    offset: tl.constexpr,
    clamp: tl.constexpr,
    block: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    is_double: tl.constexpr = grad_ptr.dtype.element_ty == tl.float64
    weight = tl.load(probabilities_ptr + row).to(tl.float64 if is_double else tl.float32)
    grad_weight = tl.zeros([block], weight.dtype)
    for first in range(0, ffn, block):
        columns = first + tl.arange(0, block)
        is_inside = columns < ffn
        raw_gate = _wide(tl.load(x_ptr + row * 2 * ffn + columns, mask=is_inside, other=0.0))
        raw_linear = _wide(tl.load(x_ptr + row * 2 * ffn + ffn + columns, mask=is_inside, other=0.0))
        grad = _wide(tl.load(grad_ptr + row * ffn + columns, mask=is_inside, other=0.0))
        gate, linear = _clamped_above(raw_gate, clamp), _clamped(raw_linear, clamp)
        sigmoid = 1 / (1 + tl.exp(-alpha * gate))
        activated, shifted = gate * sigmoid, linear + offset
        grad_weight += grad * activated * shifted
        grad = grad * weight
        grad_gate = grad * shifted * sigmoid * (1 + alpha * gate * (1 - sigmoid))
        grad_linear = grad * activated
        if clamp is not None:
            grad_gate = tl.where(raw_gate < clamp, grad_gate, 0.0)
            grad_linear = tl.where(tl.abs(raw_linear) < clamp, grad_linear, 0.0)
        out = grad_x_ptr + row * 2 * ffn + columns
        tl.store(out, grad_gate.to(grad_x_ptr.dtype.element_ty), mask=is_inside)
        tl.store(out + ffn, grad_linear.to(grad_x_ptr.dtype.element_ty), mask=is_inside)
    total = tl.sum(grad_weight, axis=0)
    tl.store(grad_probabilities_ptr + row, total.to(grad_probabilities_ptr.dtype.element_ty))
