"""Qwen3-MoE."""

from __future__ import annotations

from moe_bench.checkpoints.config import Config, common_config
from moe_bench.checkpoints.parts import require_experts, require_grouped
from moe_bench.spec.model import ModelSpec


def config(model: ModelSpec) -> Config:
    """`Qwen3MoeConfig`."""
    attention, moe = require_grouped(model), require_experts(model)
    dense = {} if model.dense_ffn_hidden_size is None else {"intermediate_size": model.dense_ffn_hidden_size}
    return (
        common_config(model, architecture="Qwen3MoeForCausalLM")
        | dense
        | {
            "num_key_value_heads": attention.num_query_groups,
            "head_dim": attention.head_dim,
            "attention_bias": attention.qkv_bias,
            "use_sliding_window": False,
            "decoder_sparse_step": moe.every_n_layers,
            "mlp_only_layers": list(range(moe.num_leading_dense_layers)),
            "moe_intermediate_size": moe.expert_ffn_hidden_size,
            "num_experts": moe.num_experts,
            "num_experts_per_tok": moe.top_k,
            "norm_topk_prob": moe.router.renormalise,
        }
    )
