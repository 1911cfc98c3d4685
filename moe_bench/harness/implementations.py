"""Which kernels and modules a built model really has, as its modules themselves say."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from megatron.core.transformer.attention import Attention
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_layer import TransformerLayer

from moe_bench.harness.build import Training
from moe_bench.results.record import Implementations

NONE_HERE = "none on this rank"


def implementations(training: Training) -> Implementations:
    """Names of what one rank runs; several of a kind are joined by commas."""
    modules = [module for chunk in training.chunks for module in chunk.modules()]
    attentions = [module for module in modules if isinstance(module, Attention)]
    expert_layers = [module for module in modules if isinstance(module, MoELayer)]
    layers = [module for module in modules if isinstance(module, TransformerLayer)]
    return Implementations(
        attention=_joined(_name(attention.core_attention) for attention in attentions),
        experts=_joined(_name(layer.experts) for layer in expert_layers),
        dispatcher=_joined(_dispatcher(layer.token_dispatcher) for layer in expert_layers),
        router=_joined(type(layer.router).__name__ for layer in expert_layers),
        normalization=_joined(_name(layer.input_layernorm) for layer in layers),
        optimizer=_joined(_optimizers(training.optimizer)),
    )


def expert_layer_name(layer: MoELayer) -> str:
    """What runs the experts of one layer, and what brings tokens to them."""
    return f"{_name(layer.experts)} behind {_dispatcher(layer.token_dispatcher)}"


def _name(module: torch.nn.Module) -> str:
    """What the module says of its kernel, or else its class."""
    return str(getattr(module, "implementation", type(module).__name__))


def _dispatcher(dispatcher: Any) -> str:
    """Class of the dispatcher, with the manager of its backend where it has several (`flex`)."""
    manager = getattr(dispatcher, "_comm_manager", None)
    name = type(dispatcher).__name__
    return name if manager is None else f"{name}:{type(manager).__name__}"


def _optimizers(optimizer: Any) -> Iterable[str]:
    """Class of each Megatron-Core optimizer and of the torch optimizer inside it."""
    for part in getattr(optimizer, "chained_optimizers", (optimizer,)):
        inner = type(part.optimizer)
        yield f"{type(part).__name__}:{inner.__module__.partition('.')[0]}.{inner.__name__}"


def _joined(names: Iterable[str]) -> str:
    return ",".join(sorted(set(names))) or NONE_HERE
