"""Mixtral 8x7B and 8x22B."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.checkpoints.config import Config, common_config
from moe_bench.checkpoints.parts import (
    ExpertNames,
    expert_layer,
    grouped_attention,
    require_experts,
    require_grouped,
)
from moe_bench.checkpoints.rule import Place, Rule
from moe_bench.spec.model import ModelSpec

NAMES = ExpertNames(block="block_sparse_moe.", router="gate", gate="w1", linear="w3", down="w2")


def layer_rules(model: ModelSpec, layer: Place, has_experts: bool) -> Iterator[Rule]:
    """One decoder layer; all of them have experts."""
    del has_experts
    yield from grouped_attention(model, layer)
    yield from expert_layer(model, layer, NAMES)


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
