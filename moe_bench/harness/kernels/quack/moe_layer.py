"""Megatron-Core's MoE layer whose all-to-all dispatcher leaves the last permutation to the experts.

With one expert rank nothing is permuted at all: the experts get the layer's input and add up each token's
rows. With several, tokens are permuted to be sent, as Megatron-Core does, but what arrives stays in the order
of its senders. Other dispatchers permute on arrival, and the experts take their rows as they come.
"""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from moe_bench.harness.kernels.quack.rows import ExpertRows, rows_of_chunks, rows_of_routing_map


class GatheringDispatcher(MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher for experts that gather; see the module's docstring.

    In the place of the tokens per expert, the experts are handed `ExpertRows`.
    """

    _rows: ExpertRows | None = None
    _counts: Tensor

    @property
    def _is_alone(self) -> bool:
        return self.ep_size == 1

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """Remember how many rows arrive from whom before the counts leave for the host."""
        tokens_per_expert = super().preprocess(routing_map)
        if self.num_local_experts > 1:
            self._counts = self.num_global_tokens_per_local_expert
        else:
            self._counts = tokens_per_expert.view(1, 1)
        return tokens_per_expert

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Permute what is to be sent; alone, say which token each row is, and copy nothing."""
        if not self._is_alone:
            return super().dispatch_preprocess(hidden_states, routing_map, probs)
        self.hidden_shape = hidden_states.shape
        self.tokens_per_expert = None
        self.num_out_tokens = routing_map.shape[0] * self.config.moe_router_topk
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        self._rows, probabilities = rows_of_routing_map(
            routing_map,
            probs,
            top_k=self.config.moe_router_topk,
            is_fused=self.config.moe_permute_fusion,
        )
        return hidden_states.view(-1, self.hidden_shape[-1]), probabilities

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, ExpertRows, Tensor]:
        """Say which token each row is, and leave tokens where they are."""
        rows, self._rows = self._rows, None
        if rows is None:
            rows = rows_of_chunks(self._counts, num_rows=hidden_states.shape[0], device=hidden_states.device)
            probs = probs.index_select(0, rows.token_of_row)
        return hidden_states, rows, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """The experts have put their output where its tokens came from."""
        return hidden_states

    def combine_postprocess(self, hidden_states: Tensor) -> Tensor:
        """Add up what came back for each token; alone, the experts have."""
        if not self._is_alone:
            return super().combine_postprocess(hidden_states)
        output = hidden_states.view(self.hidden_shape)
        return output if self.shared_experts is None else output + self.shared_experts.get_output()


class GatheringMoELayer(MoELayer):
    """Megatron-Core's layer with `GatheringDispatcher` in the place of its all-to-all dispatcher."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.config.moe_token_dispatcher_type == "alltoall":
            self.token_dispatcher = GatheringDispatcher(
                self.num_local_experts,
                self.local_expert_indices,
                config=self.config,
                pg_collection=kwargs["pg_collection"],
            )
            if self.shared_expert_overlap:
                self.token_dispatcher.set_shared_experts(self.shared_experts)
