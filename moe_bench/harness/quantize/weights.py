"""Weights of a checkpoint in a model whose experts are linear modules, one for each."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from megatron.core.utils import unwrap_model
from torch import Tensor

from moe_bench.errors import BadInputError
from moe_bench.harness.batches import Device
from moe_bench.harness.build import model_chunks, transformer_config, without_optimizer
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.settings import settings_of
from moe_bench.harness.training.checkpoint import load_checkpoint
from moe_bench.spec.recipe import Recipe

_STACKED, _SEPARATE = ".mlp.experts.linear_", ".mlp.experts.local_experts.{}.linear_"
_EXTRA_STATE = "_extra_state"
"""What linear modules add to their weights for Transformer Engine, empty without it."""


def load_weights(model: torch.nn.Module, recipe: Recipe, checkpoint: Path, *, device: Device) -> None:
    """Fill the unwrapped `model` of `recipe` from `checkpoint`, through the same model with stacked experts.

    SequentialMLP asks for extra state of every expert, which checkpoints of stacked experts have not.
    Raises BadInputError with the tensor's name where they do not fit.
    """
    kernels = recipe.kernels.model_copy(update={"grouped_gemm": True})
    arguments = megatron_arguments(recipe.model_copy(update={"kernels": kernels}))
    settings, config = settings_of(arguments), transformer_config(arguments)
    chunks = model_chunks(arguments, settings, config, device=device)
    stacked = without_optimizer(config, chunks, device=device)
    load_checkpoint(stacked, checkpoint, with_optimizer=False)
    (source,) = unwrap_model(list(stacked.chunks))
    missing, unexpected = model.load_state_dict(separate_experts(source.state_dict()), strict=False)
    for name in (*missing, *unexpected):
        if not name.endswith(_EXTRA_STATE):
            raise BadInputError(f"{checkpoint}: {name}: only one of checkpoint and quantised model has it")


def separate_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every stack [experts, out, in] as a matrix [out, in] for each expert; all else as it is."""
    separate: dict[str, Tensor] = {}
    for name, value in state.items():
        if _STACKED in name:
            for expert, matrix in enumerate(value):
                separate[name.replace(_STACKED, _SEPARATE.format(expert))] = matrix
        else:
            separate[name] = value
    return separate
