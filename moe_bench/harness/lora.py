"""Adapters of attention by nvidia-modelopt, in a model whose own weights stay as they are."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable
from typing import Any

import modelopt.torch.peft as mtpeft
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from modelopt.torch.peft.lora.layer import LoRAModule

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.adapters import NAME

_ATTENTION = "*self_attention*"
"""Not MLPs: of a gated first layer nvidia-modelopt saves the second matrix in the order of the tensor ranks,
each with its gate and its linear part, which another layout would read in another; and a stack of experts is
no layer that it knows."""


def put_adapters(chunks: Iterable[torch.nn.Module], *, rank: int) -> None:
    """Have y = W x become W x + B A x in every projection of attention that nvidia-modelopt knows.

    A is [rank, in], B [out, rank] and zero; they alone learn. Raises MissingRequirementError where it knows
    none, as of Transformer Engine's.
    """
    config = {
        "adapter_name": NAME,
        "adapter_cfg": {
            "*": {"enable": False},
            _ATTENTION: {"rank": rank, "scale": 1.0, "enable": True},
        },
    }
    adapters: list[dict[str, Any]] = []
    for chunk in chunks:
        chunk.requires_grad_(False)
        modules = list(chunk.modules())
        if not any(isinstance(module, ColumnParallelLinear | RowParallelLinear) for module in modules):
            continue  # a stage of an embedding alone
        with contextlib.redirect_stdout(sys.stderr):
            mtpeft.update_model(chunk, config)
        for module in chunk.modules():
            if isinstance(module, LoRAModule):
                adapters += module._lora_adapters.values()
    for adapter in adapters:
        _reduce_over_sequence(adapter)
    if not adapters:
        raise MissingRequirementError(
            "--lora-rank: nvidia-modelopt puts adapters beside Megatron-Core's own linear layers, and "
            "attention has none here; add --set kernels.family=torch_native"
        )


def _reduce_over_sequence(adapter: dict[str, Any]) -> None:
    """Have gradients of a matrix that sees a part of the sequence added up over tensor ranks.

    Megatron-Core does so where a weight says so (finalize_model_grads.py), and nvidia-modelopt 0.47 does not
    say so (peft/lora/plugins/megatron.py): each tensor rank would go its own way.
    """
    for whole, parallel in (("lora_a", "lora_b"), ("lora_b", "lora_a")):
        if isinstance(adapter[parallel], ColumnParallelLinear | RowParallelLinear):
            adapter[whole].weight.sequence_parallel = adapter[parallel].config.sequence_parallel
