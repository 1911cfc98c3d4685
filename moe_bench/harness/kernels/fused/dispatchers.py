"""Megatron-Core's all-gather and all-to-all dispatchers on our permutation kernels.

Megatron-Core 0.19.2 names no kernel of its own where permutation is fused: `permute`, `unpermute` and
`sort_chunks_by_idxs` (transformer/moe/moe_utils.py) call Transformer Engine's. The methods that call them are
written again here; what they exchange, count and wait for is Megatron-Core's.

Where the host still waits for the device: the all-to-all takes its splits from the host, so with EP or ETP
above one there is one wait before it (`before_ep_alltoall`); with capacity, one for the number of rows; the
all-gather dispatcher reads its local experts' rows once. Without any of these, nothing waits.
"""

from __future__ import annotations

import copy
from typing import Any

from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.moe.moe_utils import get_align_size_for_quantization, pad_routing_map
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.typed_torch import not_none
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.fused.chunk_order import sort_rows, source_rows, unsort_rows
from moe_bench.harness.kernels.fused.class_of import with_methods_of
from moe_bench.harness.kernels.fused.permutation import permute, unpermute
from moe_bench.harness.kernels.fused.row_map import RowMap, row_map


def fuse_permutation(dispatcher: MoETokenDispatcher) -> None:
    """Let a dispatcher, or one that a subclass of ours is made of, permute with our kernels.

    Raises:
        MissingRequirementError: the kernels do not serve it.
    """
    if isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
        fused: type[MoETokenDispatcher] = FusedAlltoAllDispatcher
    elif isinstance(dispatcher, MoEAllGatherTokenDispatcher):
        fused = FusedAllGatherDispatcher
    else:
        raise MissingRequirementError(
            f"kernels.fusions.permute: {type(dispatcher).__name__} permutes with Transformer Engine; use "
            "dispatch.dispatcher: alltoall or allgather, or set it to false"
        )
    dispatcher.__class__ = with_methods_of(type(dispatcher), fused)
    dispatcher.config = copy.copy(dispatcher.config)
    # Keeps the counts that the second sort reads on the device. Megatron-Core refuses it in the model's
    # configuration where Transformer Engine is absent (transformer_config.py:2651).
    dispatcher.config.moe_permute_fusion = True


class FusedAlltoAllDispatcher(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """Permutes to experts, sends, and sorts what arrives by local expert; keeps nothing after the combine."""

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Any:
        """Megatron-Core reads the tokens per expert even where nobody on the host asks for them."""
        if self.ep_size * self.tp_size == 1 and isinstance(self.num_out_tokens, int):
            return tokens_per_expert
        return super()._maybe_dtoh_and_synchronize(point, tokens_per_expert)

    def dispatch_preprocess(
        self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Count, and permute tokens [tokens, hidden] and probabilities to the rows that are sent."""
        self.hidden_shape = hidden_states.shape
        tokens = hidden_states.view(-1, self.hidden_shape[-1])
        if self.config.moe_router_padding_for_quantization:
            routing_map = pad_routing_map(routing_map, get_align_size_for_quantization(self.config))
        self.probs, self.routing_map = probs, routing_map
        self.tokens_per_expert = self.preprocess(routing_map)
        if self.shared_experts is not None:
            self.shared_experts.pre_forward_comm(hidden_states)
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_permutation_1", self.tokens_per_expert
        )
        self.hidden_shape_before_permute = tokens.shape
        mapped = row_map(routing_map, num_slots=_num_slots(self.config, self.num_experts))
        # A tensor under this name: Megatron-Core's CUDA graphs hand it from one graph to the next.
        self.reversed_local_input_permutation_mapping = mapped.slots
        return permute(tokens, probs, mapped, num_rows=int(self.num_out_tokens))

    def dispatch_postprocess(
        self, global_input_tokens: Tensor, global_probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gather over expert tensor ranks, and sort by local expert."""
        if self.drop_and_pad:
            return super().dispatch_postprocess(global_input_tokens, global_probs)
        tokens, probs = global_input_tokens, global_probs
        if self.tp_size > 1:
            sizes = self.output_splits_tp.tolist()
            tokens, probs = (
                gather_from_sequence_parallel_region(part, group=self.tp_group, output_split_sizes=sizes)
                for part in (tokens, probs)
            )
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_permutation_2", self.tokens_per_expert
        )
        if self._sorts():
            counts = self.num_global_tokens_per_local_expert
            self._sources = source_rows(counts, num_rows=tokens.shape[0], device=tokens.device)
            tokens, probs = sort_rows(tokens, probs, self._sources)
        tokens_per_expert = self._maybe_dtoh_and_synchronize("before_finish", self.tokens_per_expert)
        self.tokens_per_expert = None
        return tokens, tokens_per_expert, probs

    def _sorts(self) -> bool:
        """The rows of one sender arrive in order; Megatron-Core copies them all the same."""
        return self.num_local_experts > 1 and self.ep_size * self.tp_size > 1

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Undo `dispatch_postprocess`."""
        if self.drop_and_pad:
            return super().combine_preprocess(hidden_states)
        rows = hidden_states
        if self._sorts():
            rows, self._sources = unsort_rows(rows, self._sources), None
        if self.tp_size > 1:
            rows = reduce_scatter_to_sequence_parallel_region(
                rows.to(self.probs.dtype),
                group=self.tp_group,
                input_split_sizes=self.output_splits_tp.tolist(),
            ).to(hidden_states.dtype)
        return rows

    def combine_postprocess(self, permutated_local_input_tokens: Tensor) -> Tensor:
        """Add the rows of each token up, and the shared experts' output."""
        mapped = RowMap(slots=self.reversed_local_input_permutation_mapping)
        output = unpermute(permutated_local_input_tokens, mapped).view(self.hidden_shape)
        self.reversed_local_input_permutation_mapping = self.routing_map = self.probs = None
        if self.shared_experts is not None:
            output += self.shared_experts.get_output()
        return output


class FusedAllGatherDispatcher(MoEAllGatherTokenDispatcher):  # type: ignore[misc]
    """Permutes the gathered tokens to the local experts; keeps nothing after the combine."""

    _row_map: RowMap | None = None
    routing_map: Tensor | None

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Permute what all ranks' tokens [tokens, hidden] send to the local experts."""
        self.hidden_shape_before_permute = hidden_states.shape
        own = slice(self.local_expert_indices[0], self.local_expert_indices[-1] + 1)
        local_map = not_none(self.routing_map)[:, own].contiguous()
        self.routing_map = None
        # The one wait of this dispatcher: the rows have to be allocated.
        tokens_per_expert = local_map.sum(dim=0).cpu()
        self._row_map = row_map(local_map, num_slots=_num_slots(self.config, self.num_local_experts))
        rows, self.local_probs = permute(
            hidden_states, probs[:, own], self._row_map, num_rows=int(tokens_per_expert.sum())
        )
        return rows, tokens_per_expert, self.local_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Add the rows of each token up."""
        tokens, self._row_map = unpermute(hidden_states, not_none(self._row_map)), None
        return tokens


def _num_slots(config: TransformerConfig, num_experts: int) -> int:
    """The most of `num_experts` that a token can have; padding sends it to more than it chose."""
    if config.moe_pad_expert_input_to_capacity or config.moe_router_padding_for_quantization:
        return num_experts
    return min(int(config.moe_router_topk), num_experts)
