"""DeepSeek-V2 and V3, and what runs their code: Kimi K2, Moonlight."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.checkpoints.config import Config, common_config
from moe_bench.checkpoints.parts import (
    ExpertNames,
    dense_mlp,
    expert_layer,
    latent_attention,
    require_experts,
    require_latent,
)
from moe_bench.checkpoints.rule import Place, Rule
from moe_bench.spec.model import ModelSpec


def layer_rules(model: ModelSpec, layer: Place, has_experts: bool) -> Iterator[Rule]:
    """One decoder layer."""
    yield from latent_attention(model, layer)
    yield from expert_layer(model, layer, ExpertNames()) if has_experts else dense_mlp(model, layer)


def v3_config(model: ModelSpec) -> Config:
    """`DeepseekV3Config`: sigmoid scores with a bias that only chooses."""
    router = require_experts(model).router
    return _config(model, "DeepseekV3ForCausalLM") | {
        "n_group": router.num_groups or 1,
        "topk_group": router.groups_per_token or 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": model.num_mtp_layers,
    }


def v2_config(model: ModelSpec) -> Config:
    """`DeepseekV2Config`: softmax scores; its class never renormalises, whatever `norm_topk_prob` says."""
    router = require_experts(model).router
    is_grouped = (router.num_groups or 1) > 1
    return _config(model, "DeepseekV2ForCausalLM") | {
        "n_group": router.num_groups or 1,
        "topk_group": router.groups_per_token or 1,
        "scoring_func": "softmax",
        "topk_method": "group_limited_greedy" if is_grouped else "greedy",
    }


def _config(model: ModelSpec, architecture: str) -> Config:
    attention, moe = require_latent(model), require_experts(model)
    return common_config(model, architecture=architecture) | {
        "num_key_value_heads": attention.num_heads,
        "intermediate_size": model.dense_ffn_hidden_size,
        "q_lora_rank": attention.q_lora_rank,
        "kv_lora_rank": attention.kv_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "v_head_dim": attention.v_head_dim,
        "attention_bias": False,
        "first_k_dense_replace": moe.num_leading_dense_layers,
        "moe_intermediate_size": moe.expert_ffn_hidden_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_expert_ffn_hidden_size // moe.expert_ffn_hidden_size,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router.renormalise,
        "routed_scaling_factor": moe.router.scaling_factor,
    }
