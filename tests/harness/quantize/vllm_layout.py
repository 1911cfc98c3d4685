"""What vLLM takes of a folder that modelopt has quantised, as its source says; nothing of it runs here.

vllm/model_executor/layers/quantization/modelopt.py at 00155cd: QUANT_ALGOS and from_config for the
configuration, is_layer_excluded for what is not quantised, create_weights of the linear and expert methods
for names, types and shapes (a parameter that fuses projections takes a scale from each).
"""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

ALGORITHMS = (
    "FP8",
    "FP8_PER_CHANNEL_PER_TOKEN",
    "FP8_PB_WO",
    "NVFP4",
    "W4A16_NVFP4",
    "MXFP8",
    "MIXED_PRECISION",
)
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""packed_modules_mapping of its Qwen3-MoE and DeepSeek-V3: projections of one parameter."""


def require_readable(tensors: Mapping[str, Tensor], config: Mapping[str, Any], *, algorithm: str) -> None:
    """Assert that `quantization_config` and every tensor of a matrix are what vLLM would load."""
    assert config["quant_method"] == "modelopt"
    assert config["quant_algo"].upper() == algorithm
    assert algorithm in ALGORITHMS
    excluded = config["ignore"]
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if kind != "weight" or tensor.dim() < 2:
            continue
        own = {
            one.removeprefix(f"{module}."): tensors[one] for one in tensors if one.startswith(f"{module}.")
        }
        if _is_excluded(module, excluded):
            assert own.keys() == {"weight"} or module.endswith("mlp.gate"), module
            assert tensor.dtype == torch.bfloat16, module
        else:
            found = {kind: (one.dtype, one.shape) for kind, one in own.items()}
            assert found == _parameters(tensor, algorithm), module
    _require_alike(tensors)


def _is_excluded(module: str, excluded: list[str]) -> bool:
    return any(one in module or fnmatch(module, one) for one in excluded)


def _parameters(weight: Tensor, algorithm: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    out = weight.shape[0]
    per_tensor = (torch.float32, ())
    if algorithm == "FP8":
        matrix = (torch.float8_e4m3fn, (out, weight.shape[1]))
        return {"weight": matrix, "weight_scale": per_tensor, "input_scale": per_tensor}
    inputs = 2 * weight.shape[1]
    return {
        "weight": (torch.uint8, (out, inputs // 2)),
        "weight_scale": (torch.float8_e4m3fn, (out, inputs // 16)),
        "weight_scale_2": per_tensor,
        "input_scale": per_tensor,
    }


def _require_alike(tensors: Mapping[str, Tensor]) -> None:
    """Fused projections have the same scales of whole tensors, or vLLM rounds the weights again."""
    for name, scale in tensors.items():
        if scale.dim() or scale.dtype != torch.float32:
            continue
        module, _, kind = name.rpartition(".")
        parent, _, projection = module.rpartition(".")
        for group in _FUSED:
            if projection in group:
                assert all(torch.equal(tensors[f"{parent}.{one}.{kind}"], scale) for one in group), name
