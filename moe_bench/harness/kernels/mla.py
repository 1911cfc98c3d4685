"""Megatron-Core's multi-latent attention whose down-projections every tensor-parallel rank holds whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
    MultiLatentAttention,
)
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch import Tensor
from torch.nn import functional

from moe_bench.errors import MissingRequirementError


class DuplicatedLinear(torch.nn.Module):
    """A linear layer without bias, whole on each tensor-parallel rank and applied to that rank's tokens."""

    def __init__(
        self,
        input_size: int,
        output_size: int,
        *,
        config: TransformerConfig,
        init_method: Callable[[Tensor], Any],
    ) -> None:
        super().__init__()
        device = None if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(
            torch.empty(output_size, input_size, dtype=config.params_dtype, device=device)
        )
        if config.perform_initialization:
            # The default generator is seeded alike on all ranks of a tensor-parallel group.
            init_method(self.weight)
        # Each rank sees its share of the sequence: the mark has the gradients summed over the group.
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Project [..., input_size]; the second value is the bias left to add, of which there is none."""
        return functional.linear(x, self.weight), None


class TorchMLASelfAttention(MLASelfAttention):
    """MLASelfAttention whose projections the spec chooses freely.

    The constructor of the base class admits, without Transformer Engine, only a column-parallel
    down-projection (multi_latent_attention.py:575). That one is slower, gathering the whole sequence to
    project it to a few hundred channels, and wrong: the positional key is gathered over the output dimension,
    whose backward pass takes a slice, so that its gradient is never summed over the heads of the other ranks.
    The base class also insists, with a norm on the key-value latent, on a second norm before the query
    projection where queries are not compressed (mla_qk_norm_config.py:148); DeepSeek-V2-Lite has none. So the
    projections are built here, as FusedMLASelfAttention builds its own; the forward pass is the base class's.
    """

    def __init__(
        self,
        config: MLATransformerConfig,
        submodules: MLASelfAttentionSubmodules,
        layer_number: int,
        attn_mask_type: AttnMaskType = AttnMaskType.causal,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ) -> None:
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups()
        if groups.tp.size() > 1 and not config.sequence_parallel:
            raise MissingRequirementError(
                "torch-native multi-latent attention: tensor parallelism needs sequence parallelism "
                "(the positional key's gradient is summed where the sequence is gathered); set it"
            )
        MultiLatentAttention.__init__(
            self,
            config=config,
            submodules=submodules,
            layer_number=layer_number,
            attn_mask_type=attn_mask_type,
            attention_type="self",
            cp_comm_type=cp_comm_type,
            pg_collection=groups,
            pp_layer_offset=pp_layer_offset,
            name=name,
        )
        q_width = config.num_attention_heads * self.q_head_dim
        kv_width = config.num_attention_heads * (config.qk_head_dim + config.v_head_dim)
        kv_latent = config.kv_lora_rank
        if config.q_lora_rank is None:
            self.linear_q_proj = self._split_by_heads(submodules.linear_q_proj, config.hidden_size, q_width)
        else:
            self.linear_q_down_proj = self._whole(submodules.linear_q_down_proj, config.q_lora_rank)
            self.linear_q_up_proj = self._split_by_heads(
                submodules.linear_q_up_proj, config.q_lora_rank, q_width
            )
            self.q_layernorm = self._norm(submodules.q_layernorm, config.q_lora_rank)
        self.linear_kv_down_proj = self._whole(
            submodules.linear_kv_down_proj, kv_latent + config.qk_pos_emb_head_dim
        )
        self.linear_kv_up_proj = self._split_by_heads(submodules.linear_kv_up_proj, kv_latent, kv_width)
        self.kv_layernorm = self._norm(submodules.kv_layernorm, kv_latent)

    def _whole(self, module: Callable[..., torch.nn.Module], output_size: int) -> torch.nn.Module:
        return module(
            self.config.hidden_size, output_size, config=self.config, init_method=self.config.init_method
        )

    def _split_by_heads(
        self, module: Callable[..., torch.nn.Module], input_size: int, output_size: int
    ) -> torch.nn.Module:
        return module(
            input_size,
            output_size,
            config=self.config,
            init_method=self.config.init_method,
            gather_output=False,
            bias=False,
            skip_bias_add=False,
            is_expert=False,
            tp_group=self.tp_group,
        )

    def _norm(self, module: Callable[..., torch.nn.Module], hidden_size: int) -> torch.nn.Module:
        return module(hidden_size=hidden_size, config=self.config, eps=self.config.layernorm_epsilon)
