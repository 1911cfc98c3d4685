"""Weights held in a format's own bits, and their products with unpacked or with 8-bit factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from modelopt.torch.quantization.nn import GroupedQuantizer, TensorQuantizer
from torch import Tensor
from torch.nn.functional import (  # type: ignore[attr-defined]  # not in its .pyi
    ScalingType,
    grouped_mm,
    linear,
    scaled_grouped_mm,
    scaled_mm,
)

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.quantize.formats import fp8_factor, fp8_values, stored, unpacked
from moe_bench.spec.recipe import QuantFormat

ALIGNMENT = 16
"""Elements that both widths of an FP8 product are multiples of (torch, ScaledBlas.cpp, GroupedBlas.cpp)."""
FP8_KERNELS = "torch:scaled_mm:tensorwise, torch:scaled_grouped_mm:rowwise"
"""As a result names them."""
_IS_FAST = True
"""Accumulation within the tensor cores, as modelopt's own FP8 product has it (fp8_per_tensor_gemm.py)."""
_TENSOR_SCALES = {"fp8": "weight_scale", "nvfp4": "weight_scale_2"}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """A matrix [out, in], or those of a stack [experts, out, in], each with its own scales."""

    format: QuantFormat
    tensors: Mapping[str, Tensor]
    """As `formats.stored` names them; of a stack with a leading dimension."""
    dtype: torch.dtype
    """Of the weight that was packed."""

    @classmethod
    def of(
        cls, weight: Tensor, format: QuantFormat, quantizer: TensorQuantizer | GroupedQuantizer
    ) -> PackedWeight:
        """`weight` with the calibrated maxima of its quantiser, or of one for each matrix of a stack."""
        weight = weight.detach()
        if weight.dim() == 2:
            tensors = stored(weight, format, quantizer.amax)
        else:
            each = [stored(matrix, format, one.amax) for matrix, one in zip(weight, quantizer, strict=True)]
            tensors = {kind: torch.stack([one[kind] for one in each]) for kind in each[0]}
        return cls(format=format, tensors=tensors, dtype=weight.dtype)

    @property
    def is_stack(self) -> bool:
        """Whether it is one of experts."""
        return self.tensors["weight"].dim() == 3

    @property
    def num_bytes(self) -> int:
        """Values and scales as they lie in memory."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def tensor_scale_bytes(self) -> int:
        """Of these the scales of whole tensors, which every tensor-parallel rank has."""
        kind = _TENSOR_SCALES.get(self.format)
        return 0 if kind is None else self.tensors[kind].nbytes

    def unpacked(self) -> Tensor:
        """[..., out, in], bit by bit what the quantiser makes of the weight."""
        if not self.is_stack:
            return unpacked(self.tensors, self.format, self.dtype)
        kinds, parts = self.tensors.keys(), zip(*self.tensors.values(), strict=True)
        matrices = [unpacked(dict(zip(kinds, one, strict=True)), self.format, self.dtype) for one in parts]
        return torch.stack(matrices)


class HeldProducts(Protocol):
    """A packed weight with the way in which inputs meet it; for evaluation, without a gradient."""

    weight: PackedWeight

    def linear(self, x: Tensor) -> Tensor:
        """x [..., in], as it comes, to [..., out]."""

    def grouped(self, x: Tensor, offsets: Tensor) -> Tensor:
        """x [tokens, in], as it comes, to [tokens, out]; expert e's rows end at offsets[e]."""


class UnpackedProducts:
    """Inputs rounded as the simulation rounds them, times weights that are unpacked for every product."""

    def __init__(self, weight: PackedWeight, input_quantizer: TensorQuantizer) -> None:
        self.weight = weight
        self._input_quantizer = input_quantizer

    def linear(self, x: Tensor) -> Tensor:
        """As `HeldProducts`."""
        return linear(self._input_quantizer(x), self.weight.unpacked())

    def grouped(self, x: Tensor, offsets: Tensor) -> Tensor:
        """As `HeldProducts`."""
        if x.shape[0] == 0:
            return x.new_empty(0, self.weight.tensors["weight"].shape[1])
        return grouped_mm(self._input_quantizer(x), self.weight.unpacked().transpose(1, 2), offs=offsets)


class Fp8Products:
    """E4M3 times E4M3 in the tensor cores: the values that the simulation rounds to, never turned back.

        y = scale_x scale_w (q_x . q_w),   scale = amax / 448 of the calibrated quantiser

    One scale belongs to all of x and one to each matrix. A dense product takes both as they are; the grouped
    one knows scales per row alone on Hopper, and is given the same scale for all rows. What is left between
    this and the simulation is that the latter rounds q times scale to BF16 (2^-9 of each factor) and sums in
    another order. modelopt's own products of compressed weights are not used: they take no stack of experts,
    divide in BF16 before they round, and add a bias that Megatron-Core adds again where it hands it on
    (plugins/megatron.py, RealQuantLinear.forward with self.bias).
    """

    def __init__(self, weight: PackedWeight, input_quantizer: TensorQuantizer, *, name: str) -> None:
        """Raises MissingRequirementError, by the layer's `name`, for what the kernels do not take."""
        values = weight.tensors["weight"]
        if weight.dtype != torch.bfloat16:
            raise MissingRequirementError(f"{name}: FP8 products have BF16 results, not {weight.dtype}")
        if values.shape[-1] % ALIGNMENT or values.shape[-2] % ALIGNMENT:
            raise MissingRequirementError(
                f"{name}: {values.shape[-1]} inputs and {values.shape[-2]} outputs on a rank; FP8 products "
                f"take multiples of {ALIGNMENT}; leave --arithmetic at simulated, or cut it otherwise"
            )
        self.weight = weight
        self._input_factor = fp8_factor(input_quantizer.amax)
        self._input_scale = 1 / self._input_factor

    def linear(self, x: Tensor) -> Tensor:
        """As `HeldProducts`, BF16."""
        rows = fp8_values(x, self._input_factor).reshape(-1, x.shape[-1])
        y: Tensor = scaled_mm(
            rows,
            self.weight.tensors["weight"].t(),
            self._input_scale,
            ScalingType.TensorWise,
            self.weight.tensors["weight_scale"],
            ScalingType.TensorWise,
            use_fast_accum=_IS_FAST,
        )
        return y.view(*x.shape[:-1], -1)

    def grouped(self, x: Tensor, offsets: Tensor) -> Tensor:
        """As `HeldProducts`, BF16; groups of any size, empty ones too (kernels/fp8_grouped.py)."""
        values, scales = self.weight.tensors["weight"], self.weight.tensors["weight_scale"]
        if x.shape[0] == 0:
            return x.new_empty(0, values.shape[1])
        y: Tensor = scaled_grouped_mm(
            fp8_values(x, self._input_factor).contiguous(),
            values.transpose(1, 2),
            self._input_scale.expand(x.shape[0]).contiguous(),
            ScalingType.RowWise,
            scales[:, None].expand(-1, values.shape[1]).contiguous(),
            ScalingType.RowWise,
            offs=offsets,
            use_fast_accum=_IS_FAST,
        )
        return y


def held_weight(module: Any) -> PackedWeight | None:
    """What a quantised layer holds instead of its weight, if anything."""
    held: HeldProducts | None = getattr(module, "held", None)
    return None if held is None else held.weight
