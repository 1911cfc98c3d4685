"""OLMoE: norms over all query heads and over all key heads at once."""

from __future__ import annotations

from moe_bench.checkpoints.config import Config, common_config
from moe_bench.checkpoints.parts import require_experts, require_grouped
from moe_bench.spec.model import ModelSpec


def config(model: ModelSpec) -> Config:
    """`OlmoeConfig`, whose `intermediate_size` is the width of an expert."""
    attention, moe = require_grouped(model), require_experts(model)
    return common_config(model, architecture="OlmoeForCausalLM") | {
        "num_key_value_heads": attention.num_query_groups,
        "attention_bias": attention.qkv_bias,
        "clip_qkv": None,
        "intermediate_size": moe.expert_ffn_hidden_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "norm_topk_prob": moe.router.renormalise,
    }
