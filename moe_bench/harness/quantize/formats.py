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
    block = STORAGE["nvfp4"].block_size
    scale = None if amax is None else amax.float() / _NVFP4_TENSOR_RANGE
    packed, block_scales, tensor_scale = NVFP4QTensor.quantize(
        values.contiguous(), block, weights_scaling_factor_2=scale
    )
    rounded: Tensor = packed.dequantize(
        dtype=values.dtype, scale=block_scales, double_scale=tensor_scale, block_sizes={-1: block}
    )
    return rounded


def round_mxfp4(values: Tensor) -> Tensor:
    """`values` [..., in] as MXFP4 holds them."""
    block = STORAGE["mxfp4"].block_size
    packed, scales = MXFP4QTensor.quantize(values.contiguous(), block)
    rounded: Tensor = packed.dequantize(dtype=values.dtype, scale=scales, block_sizes={-1: block})
    return rounded.view_as(values)


def stored_weight(weight: Tensor, format: QuantFormat, amax: float | None) -> dict[str, Tensor]:
    """A weight [..., out, in] as its file holds it, by modelopt's names (export/quant_utils.py).

    4-bit values lie two in a byte, the first in the low half. `amax` is that of the weight's quantiser, None
    with MXFP4. What is read back is the weight that the quantiser makes of it, bit by bit.
    """
    block = STORAGE[format].block_size
    if format == "mxfp4" or amax is None:
        packed, exponents = MXFP4QTensor.quantize(weight.contiguous(), block)
        return {
            "weight": packed._quantized_data,
            "weight_scale": exponents.view(*weight.shape[:-1], -1),
        }
    largest = torch.tensor(amax, dtype=torch.float32)
    if format == "fp8":
        # 448 / amax and its inverse as modelopt rounds them (tensor_quant.py, fp8_eager)
        factor = _E4M3_MAX / largest
        values = (weight.float() * factor).clamp(min=-_E4M3_MAX, max=_E4M3_MAX)
        return {"weight": values.to(torch.float8_e4m3fn), "weight_scale": 1 / factor}
    packed, block_scales, tensor_scale = NVFP4QTensor.quantize(
        weight.contiguous(), block, weights_scaling_factor_2=largest / _NVFP4_TENSOR_RANGE
    )
    return {
        "weight": packed._quantized_data,
        "weight_scale": block_scales,
        "weight_scale_2": tensor_scale,
    }


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
