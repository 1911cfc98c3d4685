"""Shared experts as Megatron-Core 0.19 has none: with biases, and weighed against the routed ones."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from moe_bench.errors import MissingRequirementError


class BiasedSharedExperts(MLP):  # type: ignore[misc]
    """An MLP of every token whose two projections have biases; `SharedExpertMLP` refuses them."""

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MLPSubmodules,
        gate: bool,
        pg_collection: ProcessGroupCollection,
        name: str | None = None,
    ) -> None:
        if gate or config.moe_shared_expert_overlap:
            raise MissingRequirementError(
                "shared experts with biases have neither a gate nor overlap; leave both off"
            )
        own = copy.copy(config)
        own.ffn_hidden_size = config.moe_shared_expert_intermediate_size
        super().__init__(
            own, submodules, ffn_hidden_size=own.ffn_hidden_size, tp_group=pg_collection.tp, name=name
        )

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        """[sequence, batch, hidden] to the same."""
        output, bias = super().forward(hidden_states, *args, **options)
        summed: Tensor = output + bias
        return summed


class Mixing(MegatronModule):  # type: ignore[misc]
    """w = softmax(x A + b) over two: what routed and shared experts of a token count (arXiv:2201.05596, 4.1;
    deepspeed/moe/layer.py, `coefficient`).
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        sizes = {"weight": (2, config.hidden_size), "bias": (2,)}
        for name, size in sizes.items():
            parameter = torch.nn.Parameter(torch.zeros(size, dtype=config.params_dtype, device=device))
            set_tensor_model_parallel_attributes(parameter, False, -1, 1)
            parameter.sequence_parallel = config.sequence_parallel
            self.register_parameter(name, parameter)
        if config.perform_initialization:
            config.init_method(self.weight)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [..., 1] of routed and of shared experts, of tokens [..., hidden]."""
        logits = functional.linear(hidden_states, self.weight, self.bias)
        routed, shared = logits.softmax(dim=-1, dtype=torch.float32).split(1, dim=-1)
        return routed, shared


class MixingMoELayer(MoELayer):  # type: ignore[misc]
    """w_1 sum_e p_e E_e(x) + w_2 M(x), with w of `Mixing`.

    The routed half is weighed through its probabilities, w_1 p_e, before they are dispatched, so that every
    dispatcher and schedule carries it. The logits are made on either way: 4 t H operations more than once.
    """

    def __init__(self, config: TransformerConfig, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)
        self.mixing = Mixing(config)

    def route(self, hidden_states: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Probabilities, weighed, and map [tokens, experts]."""
        probs, routing_map = super().route(hidden_states, padding_mask)
        routed, _ = self.mixing(hidden_states)
        return probs * routed.view(-1, 1).to(probs.dtype), routing_map

    def shared_experts_compute(self, hidden_states: Tensor) -> Tensor | None:
        """Output of the shared experts, weighed."""
        output = super().shared_experts_compute(hidden_states)
        if output is None:
            return None
        _, shared = self.mixing(hidden_states)
        return output * shared.to(output.dtype)
