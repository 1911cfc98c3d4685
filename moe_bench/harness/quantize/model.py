"""Quantisers in a model on all ranks of a layout: set, switched, and what they weigh and know."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import modelopt.torch.quantization as mtq
import torch
from megatron.core.utils import unwrap_model
from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
from torch import Tensor

from moe_bench.errors import MeasurementError, MissingRequirementError
from moe_bench.harness.batches import Device
from moe_bench.harness.quantize.formats import block_misfit, modelopt_config
from moe_bench.harness.quantize.layers import register_layers
from moe_bench.harness.quantize.packed import Fp8Products, PackedWeight, UnpackedProducts, held_weight
from moe_bench.harness.weights import sharded_tensors
from moe_bench.spec.recipe import QuantFormat

_AMAX = "._amax"


def quantize_chunks(
    wrapped: Sequence[torch.nn.Module],
    format: QuantFormat,
    *,
    experts_only: bool,
    device: Device,
    calibrate: Callable[[], object] | None,
) -> None:
    """Put quantisers before the weights and inputs of linear layers, and let `calibrate` show them inputs.

    The largest inputs and weights are those of all ranks that share a layer (modelopt's max_calibrate).
    Without `calibrate` the places of the largest inputs are made and left for a checkpoint to fill. A
    collective call of all ranks; raises MeasurementError where an expert layer of some rank met no token.
    """
    register_layers()
    # one list, so that all chunks of a rank are calibrated by the same passes through the pipeline
    model = torch.nn.ModuleList(unwrap_model(list(wrapped)))
    misfits = [
        name
        for name, module in model.named_modules()
        if module in QuantModuleRegistry
        and (weight := linear_weight(module)) is not None
        and block_misfit(weight, format) is not None
    ]
    config = modelopt_config(format, device=device, experts_only=experts_only, left_out=misfits)
    with contextlib.redirect_stdout(sys.stderr):  # modelopt prints how many quantisers it made
        try:
            mtq.quantize(model, config, None if calibrate is None else lambda _: calibrate())
        except RuntimeError as error:
            if "MoE calibration incomplete" not in str(error):
                raise
            raise MeasurementError(
                "calibration: the experts of some rank met no token; use more --calibration-batches"
            ) from error
    for quantizer in quantizers(wrapped):
        if quantizer.amax is None and not quantizer.is_mx_format:
            quantizer.amax = torch.zeros((), device=device)
    for module in model.modules():
        # what a checkpoint says of an amax is meant as it stands, not to be measured again on loading
        module.allow_post_restore = False


def linear_weight(module: torch.nn.Module) -> Tensor | None:
    """[out, in] or [experts, out, in] of what multiplies; None where it has none of its own."""
    weight = getattr(module, "weight", None)
    return weight if weight is not None else getattr(module, "weight0", None)


def quantizers(chunks: Sequence[torch.nn.Module]) -> list[TensorQuantizer]:
    """Those that are on."""
    found = (module for chunk in chunks for module in chunk.modules())
    return [module for module in found if isinstance(module, TensorQuantizer) and module.is_enabled]


def hold_packed(
    chunks: Sequence[torch.nn.Module], format: QuantFormat, *, arithmetic: Literal["packed", "real"]
) -> None:
    """Pack every quantised weight with its calibrated scales, beside the original that it is compared with.

    Raises MissingRequirementError for a layer that cannot hold one or that no FP8 product takes.
    """
    for chunk in unwrap_model(list(chunks)):
        for name, module in chunk.named_modules():
            if not is_quantized(module):
                continue
            if not hasattr(module, "held"):
                raise MissingRequirementError(
                    f"{name}: modelopt's {type(module).__name__} multiplies no packed weight here; "
                    "leave --arithmetic at simulated"
                )
            weight = PackedWeight.of(module.get_parameter("weight"), format, module.weight_quantizer)
            module.held = (
                UnpackedProducts(weight, module.input_quantizer)
                if arithmetic == "packed"
                else Fp8Products(weight, module.input_quantizer, name=name)
            )


def passes(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Without any rounding, with all of it simulated, and then, where weights are packed, with those."""
    switched = quantizers(chunks)
    held = [
        (module, module.held)
        for chunk in chunks
        for module in chunk.modules()
        if held_weight(module) is not None
    ]
    for quantizer in switched:
        quantizer.disable()
    yield
    for quantizer in switched:
        quantizer.enable()
    for module, _ in held:
        module.held = None
    yield
    if held:
        for module, products in held:
            module.held = products
        yield


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether the module's weight is rounded."""
    quantizer = getattr(module, "weight_quantizer", None)
    return isinstance(module, QuantModule) and quantizer is not None and bool(quantizer.is_enabled)


def largest_values(chunks: Sequence[torch.nn.Module]) -> Mapping[str, float]:
    """What each quantiser of this rank maps its largest value to the format's largest by.

    By the key of a checkpoint, `decoder.layers.1.mlp.experts.experts.linear_fc1.weight_quantizer[17]`.
    """
    return {
        _label(shard.key.removesuffix(_AMAX), shard.global_offset[: shard.prepend_axis_num]): float(
            shard.data
        )
        for chunk in unwrap_model(list(chunks))
        for shard in sharded_tensors(chunk)
        if shard.key.endswith(_AMAX)
    }


def _label(key: str, place: Sequence[int]) -> str:
    return key + "".join(f"[{index}]" for index in place)


def quantized_keys(chunks: Sequence[torch.nn.Module]) -> frozenset[str]:
    """Keys, in a checkpoint, of the weights that this rank has a part of and that are rounded."""
    models = unwrap_model(list(chunks))
    rounded = {
        parameter.untyped_storage().data_ptr()
        for model in models
        for module in model.modules()
        if is_quantized(module)
        for name, parameter in module.named_parameters(recurse=False)
        if name.startswith("weight")
    }
    return frozenset(
        shard.key
        for model in models
        for shard in sharded_tensors(model)
        if isinstance(shard.data, Tensor) and shard.data.untyped_storage().data_ptr() in rounded
    )
