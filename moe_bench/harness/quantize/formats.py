"""The formats as nvidia-modelopt wants them, its 4-bit blocks rounded without a GPU, and what they weigh."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import is_registered_quant_backend, register_quant_backend
from modelopt.torch.quantization.qtensor import MXFP4QTensor, NVFP4QTensor
from torch import Tensor

from moe_bench.harness.batches import Device
from moe_bench.spec.recipe import QuantFormat

EXPERTS = "mlp.experts."
"""In the name of routed experts; shared experts are `mlp.shared_experts`."""
KEPT: Mapping[str, str] = MappingProxyType(
    {"output_layer": "the output layer stays", "mtp.": "prediction modules stay"}
)
"""Beginnings of the names of a chunk's modules that are never quantised, and why."""
_E4M3_MAX = 448.0
_NO_RANGE = 2.0**-24
"""Largest maximum that modelopt takes for zero (tensor_quant.py, _fp8_eager)."""
_NVFP4_TENSOR_RANGE = 6.0 * _E4M3_MAX
"""Largest E2M1 value times largest E4M3 scale: what the scale of a whole tensor maps its maximum to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Storage:
    """How a weight [out, in] is stored."""

    bits_per_value: int
    block_size: int | None
    """Values along `in` that share a scale of one byte; None has no such scales."""
    tensor_scale_bytes: int
    """Of the one scale of the whole tensor."""

    def num_bytes(self, num_params: int, *, num_tensors: int) -> int:
        """Of values and scales of so many tensors; in each of them values are a multiple of the block."""
        num_blocks = 0 if self.block_size is None else num_params // self.block_size
        return num_params * self.bits_per_value // 8 + num_blocks + num_tensors * self.tensor_scale_bytes


STORAGE: Mapping[QuantFormat, Storage] = MappingProxyType(
    {
        "fp8": Storage(bits_per_value=8, block_size=None, tensor_scale_bytes=4),
        # E4M3 scales under one in FP32; E8M0 scales alone (OCP Microscaling Formats 1.0, 5.2)
        "nvfp4": Storage(bits_per_value=4, block_size=16, tensor_scale_bytes=4),
        "mxfp4": Storage(bits_per_value=4, block_size=32, tensor_scale_bytes=0),
    }
)


def modelopt_config(
    format: QuantFormat, *, device: Device, experts_only: bool, left_out: Iterable[str] = ()
) -> dict[str, Any]:
    """modelopt's own default of `format`, weights and inputs, for the chunks of a model in one list.

    `left_out` are names of modules, beside those of `KEPT`. On the host FP8 is rounded by modelopt's own
    function; its kernels for NVFP4 and MXFP4 need CUDA, and its tensor classes take their place.
    """
    presets = {
        "fp8": mtq.FP8_DEFAULT_CFG,
        "nvfp4": mtq.NVFP4_DEFAULT_CFG,
        "mxfp4": mtq.MXFP4_DEFAULT_CFG,
    }
    config: dict[str, Any] = copy.deepcopy(presets[format])
    for rule in config["quant_cfg"]:
        name = rule["quantizer_name"]
        if name in ("*weight_quantizer", "*input_quantizer"):
            if experts_only:
                rule["quantizer_name"] = f"*{EXPERTS}{name}"
            if device == "cpu" and format in _ON_HOST:
                rule["cfg"]["backend"] = _registered(format)
    kept = (*(f"*.{beginning}*" for beginning in KEPT), *(f"{name}.*" for name in left_out))
    config["quant_cfg"] += [{"quantizer_name": pattern, "enable": False} for pattern in kept]
    return config


def round_nvfp4(values: Tensor, amax: Tensor | None) -> Tensor:
    """`values` [..., in] as NVFP4 holds them; `amax` is the calibrated maximum of all, if any."""
    return unpacked(stored(values, "nvfp4", amax), "nvfp4", values.dtype)


def round_mxfp4(values: Tensor) -> Tensor:
    """`values` [..., in] as MXFP4 holds them."""
    return unpacked(stored(values, "mxfp4", None), "mxfp4", values.dtype)


def fp8_factor(amax: Tensor) -> Tensor:
    """What values are multiplied by before they become E4M3, FP32; its inverse is their scale.

    As modelopt rounds both, and 448 where there is nothing to scale (tensor_quant.py, _fp8_eager).
    """
    largest = amax.float()
    return _E4M3_MAX / torch.where(largest <= _NO_RANGE, torch.ones_like(largest), largest)


def fp8_values(values: Tensor, factor: Tensor) -> Tensor:
    """E4M3 of `values` times `factor`, with no rounding but the one; what is too large is cut off."""
    return (values.float() * factor).clamp(min=-_E4M3_MAX, max=_E4M3_MAX).to(torch.float8_e4m3fn)


def stored(values: Tensor, format: QuantFormat, amax: Tensor | None) -> dict[str, Tensor]:
    """A tensor [..., in] as a file holds it, by the names of modelopt's weights (export/quant_utils.py).

    4-bit values lie two in a byte, the first in the low half. `amax` is that of the tensor's quantiser; MXFP4
    has none, and NVFP4 without one takes the largest value. modelopt's FP8QTensor is not used: it divides in
    BF16 before it rounds to E4M3, and so rounds twice.
    """
    block = STORAGE[format].block_size
    match format:
        case "fp8":
            factor = fp8_factor(values.abs().max() if amax is None else amax)
            return {"weight": fp8_values(values, factor), "weight_scale": 1 / factor}
        case "nvfp4":
            scale = None if amax is None else amax.float() / _NVFP4_TENSOR_RANGE
            packed, block_scales, tensor_scale = NVFP4QTensor.quantize(
                values.contiguous(), block, weights_scaling_factor_2=scale
            )
            return {
                "weight": packed._quantized_data,
                "weight_scale": block_scales,
                "weight_scale_2": tensor_scale,
            }
        case "mxfp4":
            packed, exponents = MXFP4QTensor.quantize(values.contiguous(), block)
            return {
                "weight": packed._quantized_data,
                "weight_scale": exponents.view(*values.shape[:-1], -1),
            }


def unpacked(tensors: Mapping[str, Tensor], format: QuantFormat, dtype: torch.dtype) -> Tensor:
    """[..., in] in `dtype`, bit by bit what the quantiser makes of the tensor that `stored` was given."""
    values, scale = tensors["weight"], tensors["weight_scale"]
    block_sizes = {-1: STORAGE[format].block_size}
    match format:
        case "fp8":
            whole: Tensor = (values.float() * scale).to(dtype)
        case "nvfp4":
            shape = torch.Size((*values.shape[:-1], 2 * values.shape[-1]))
            whole = NVFP4QTensor(shape, dtype, values).dequantize(
                dtype=dtype,
                scale=scale,
                double_scale=tensors["weight_scale_2"],
                block_sizes=block_sizes,
            )
        case "mxfp4":
            shape = torch.Size((*values.shape[:-1], 2 * values.shape[-1]))
            packed = MXFP4QTensor(shape, dtype, values)
            whole = packed.dequantize(dtype=dtype, scale=scale, block_sizes=block_sizes).view(shape)
    return whole


def stored_input_scale(format: QuantFormat, amax: float) -> Tensor:
    """What inputs are divided by before they are rounded (get_activation_scaling_factor)."""
    return torch.tensor(amax, dtype=torch.float32) / (_E4M3_MAX if format == "fp8" else _NVFP4_TENSOR_RANGE)


class _StraightThrough(torch.autograd.Function):
    """A rounding whose gradient is that of no rounding, as modelopt's kernels have it (pass_through_bwd)."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
        return rounded(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


_ON_HOST: Mapping[QuantFormat, Callable[[Tensor, Any], Tensor]] = MappingProxyType(
    {
        "nvfp4": lambda values, quantizer: _StraightThrough.apply(
            values, lambda given: round_nvfp4(given, quantizer.amax)
        ),
        "mxfp4": lambda values, quantizer: _StraightThrough.apply(values, round_mxfp4),
    }
)


def _registered(format: QuantFormat) -> str:
    """Name of the backend, which modelopt keeps for the process."""
    name = f"moe_bench_{format}"
    if not is_registered_quant_backend(name):
        register_quant_backend(name, _ON_HOST[format])
    return name


def block_misfit(weight: torch.Tensor, format: QuantFormat) -> str | None:
    """Why a weight [..., out, in] cannot be cut into the format's blocks; None if it can."""
    block = STORAGE[format].block_size
    if block is None or weight.shape[-1] % block == 0:
        return None
    return f"{weight.shape[-1]} inputs on a rank, no multiple of {block}"
