"""Mixtral 8x7B and 8x22B."""

from __future__ import annotations

from moe_bench.checkpoints.config import Config, common_config
from moe_bench.checkpoints.parts import ExpertNames, require_experts, require_grouped
from moe_bench.spec.model import ModelSpec

NAMES = ExpertNames(block="block_sparse_moe.", router="gate", gate="w1", linear="w3", down="w2")


def config(model: ModelSpec) -> Config:
    """`MixtralConfig`, which always renormalises the chosen probabilities."""
    attention, moe = require_grouped(model), require_experts(model)
    return common_config(model, architecture="MixtralForCausalLM") | {
        "num_key_value_heads": attention.num_query_groups,
        "head_dim": attention.head_dim,
        "sliding_window": None,
        "intermediate_size": moe.expert_ffn_hidden_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
    }
