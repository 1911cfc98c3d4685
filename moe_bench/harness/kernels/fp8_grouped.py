"""The experts' products in FP8 with a scale per row, on torch.nn.functional.scaled_grouped_mm.

Precision `fp8_rowwise`. Of the three products of each projection two are FP8:

    output          y  = x W^T     x by token, W by output channel; fast accumulation
    input gradient  dx = dy W      dy by token, W by input channel, transposed; accumulation in FP32
    weight gradient dW = dy^T x    BF16, as without FP8 (`grouped_linear`)

Scales belong to rows of the left and columns of the right factor, so they leave the sum and multiply the
product once; Hopper's FP8 tensor cores want both factors contiguous along the sum, hence the transpose of W.
All factors are e4m3, the one type that the kernel takes (torch, aten/src/ATen/native/cuda/GroupedBlas.cpp).
Tokens that are quantized row by row need no padding: only row-major rows are cut. Accumulation is Transformer
Engine's choice (common/recipe/__init__.py, Float8CurrentScaling: split accumulators in dgrad, not in fprop).

The weight gradient stays BF16. Its sum runs over the tokens of a group, so FP8 would need both factors
quantized again along the tokens and transposed, groups padded to 16 rows, and none of them empty: the kernel
asserts both on the device (GroupMMCommon.cuh, "CUTLASS cannot handle delta=0 here"), and an expert without
tokens is ordinary. torchao keeps it in BF16 in its recipe `rowwise_with_gw_hp` (torchao/float8/config.py).

Weights are quantized once per optimizer step, when its first micro batch uses them, and both copies are kept:
2 bytes per weight. Under Megatron-FSDP, whose whole weights come and go, every use quantizes them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, scaled_grouped_mm  # type: ignore[attr-defined]  # not in its .pyi

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.fp8_quantize import Quantized, quantize_columns, quantize_rows

ALIGNMENT = 16
"""Elements that widths must be multiples of (torch, GroupedBlas.cpp, _scaled_grouped_mm_cuda_v2)."""


class RowwiseFp8Products:
    """Outputs and input gradients of the experts in FP8."""

    implementation = "torch:scaled_grouped_mm:rowwise"

    def __init__(self, *, keeps_weights: bool = False) -> None:
        """`keeps_weights`: of the one stack that these products are of, until `forget_weights`."""
        self._keeps_weights = keeps_weights
        self._rows: Quantized | None = None
        self._columns: Quantized | None = None

    def of_stack(self, *, are_apart: bool) -> RowwiseFp8Products:
        """New ones, which keep the FP8 copies of a stack that stays where it is."""
        return RowwiseFp8Products(keeps_weights=not are_apart)

    def check_widths(self, *, dtype: torch.dtype, **widths: int) -> None:
        """Raise MissingRequirementError for other types than BF16, and widths that are no multiple of 16."""
        if dtype != torch.bfloat16:
            raise MissingRequirementError(f"experts of {dtype}: fp8_rowwise quantizes BF16; set bf16")
        for name, width in widths.items():
            if width % ALIGNMENT:
                raise MissingRequirementError(
                    f"{name} {width}: scaled_grouped_mm takes multiples of {ALIGNMENT}; choose one, or bf16"
                )

    def output(self, x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """x [tokens, in] and weight [experts, out, in], BF16, to [tokens, out]."""
        rows = self._rows or quantize_rows(weight)
        self._rows = rows if self._keeps_weights else None
        return _product(quantize_rows(x), rows, offsets, is_fast=True)

    def input_gradient(self, grad: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
        """grad [tokens, out] and weight [experts, out, in], BF16, to [tokens, in]."""
        columns = self._columns or quantize_columns(weight)
        self._columns = columns if self._keeps_weights else None
        return _product(quantize_rows(grad), columns, offsets, is_fast=False)

    def keep_weights(self, weight: Tensor) -> None:
        """Quantize a stack [experts, out, in] before it is used; nothing where copies are not kept."""
        if self._keeps_weights:
            self._rows, self._columns = quantize_rows(weight), quantize_columns(weight)

    def forget_weights(self) -> None:
        """The stack has changed: quantize it again when it is used next."""
        self._rows = self._columns = None


def quantized_stacks(
    chunks: Iterable[torch.nn.Module],
) -> Iterator[tuple[torch.nn.Module, RowwiseFp8Products]]:
    """The stacks of expert weights in model chunks whose products are in FP8, with these."""
    for chunk in chunks:
        for module in chunk.modules():
            products = getattr(module, "products", None)
            if isinstance(products, RowwiseFp8Products):
                yield module, products


def forget_after_steps(
    optimizers: Iterable[torch.optim.Optimizer], chunks: Iterable[torch.nn.Module]
) -> None:
    """Let every step of `optimizers` end the life of the FP8 copies in `chunks`."""
    kept = [products for _, products in quantized_stacks(chunks)]

    def forget(*step: object) -> None:
        for products in kept:
            products.forget_weights()

    for optimizer in optimizers:
        optimizer.register_step_post_hook(forget)


def _product(rows: Quantized, weight: Quantized, offsets: Tensor, *, is_fast: bool) -> Tensor:
    """rows [tokens, inner] and weight [experts, columns, inner] to BF16 [tokens, columns]."""
    return scaled_grouped_mm(
        rows.values,
        weight.values.transpose(1, 2),
        rows.scales,
        ScalingType.RowWise,
        weight.scales,
        ScalingType.RowWise,
        offs=offsets,
        use_fast_accum=is_fast,
    )
