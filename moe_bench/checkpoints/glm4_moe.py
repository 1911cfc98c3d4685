"""GLM-4.5 and GLM-4.5-Air."""

from __future__ import annotations

from moe_bench.checkpoints.config import Config, common_config
from moe_bench.checkpoints.parts import require_experts, require_grouped
from moe_bench.spec.model import ModelSpec


def config(model: ModelSpec) -> Config:
    """`Glm4MoeConfig`."""
    attention, moe = require_grouped(model), require_experts(model)
    return common_config(model, architecture="Glm4MoeForCausalLM") | {
        "num_key_value_heads": attention.num_query_groups,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "use_qk_norm": attention.qk_norm == "per_head",
        "partial_rotary_factor": model.rope.rotary_fraction,
        "intermediate_size": model.dense_ffn_hidden_size,
        "first_k_dense_replace": moe.num_leading_dense_layers,
        "moe_intermediate_size": moe.expert_ffn_hidden_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_expert_ffn_hidden_size // moe.expert_ffn_hidden_size,
        "num_experts_per_tok": moe.top_k,
        "n_group": moe.router.num_groups or 1,
        "topk_group": moe.router.groups_per_token or 1,
        "norm_topk_prob": moe.router.renormalise,
        "routed_scaling_factor": moe.router.scaling_factor,
        "num_nextn_predict_layers": model.num_mtp_layers,
    }
