"""GPT-OSS: biases everywhere, sinks, and experts stacked, transposed and with gates that alternate."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.checkpoints.config import Config, common_config
from moe_bench.checkpoints.parts import grouped_attention, require_experts, require_grouped
from moe_bench.checkpoints.rule import AlternatingGate, Place, Rule, TransposedExperts
from moe_bench.spec.model import ModelSpec

SWIGLU_ALPHA = 1.702
"""Of the gate's sigmoid, in every released GPT-OSS; Megatron-Core's quick GELU has no other."""


def layer_rules(model: ModelSpec, layer: Place, has_experts: bool) -> Iterator[Rule]:
    """One decoder layer; all of them have experts."""
    del has_experts
    attention, moe = require_grouped(model), require_experts(model)
    hidden, ffn, count = model.hidden_size, moe.expert_ffn_hidden_size, moe.num_experts
    yield from grouped_attention(model, layer)
    if model.linear_bias:
        yield layer.rule("self_attention.linear_proj.bias", "self_attn.o_proj.bias", (hidden,))
    if attention.sinks:
        sinks = "self_attention.core_attention.softmax_offset"
        yield layer.rule(sinks, "self_attn.sinks", (attention.num_heads,))
    yield layer.rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (hidden,))
    yield layer.rule("mlp.router.weight", "mlp.router.weight", (count, hidden))
    yield layer.rule("mlp.router.bias", "mlp.router.bias", (count,))
    stack = Place(
        megatron=f"{layer.megatron}mlp.experts.experts.", huggingface=f"{layer.huggingface}mlp.experts."
    )
    yield stack.rule(
        "linear_fc1.weight",
        "gate_up_proj",
        (count, hidden, 2 * ffn),
        shape=(count, 2 * ffn, hidden),
        how=AlternatingGate(is_bias=False),
    )
    up_bias = (count, 2 * ffn)
    yield stack.rule("linear_fc1.bias", "gate_up_proj_bias", up_bias, how=AlternatingGate(is_bias=True))
    yield stack.rule(
        "linear_fc2.weight",
        "down_proj",
        (count, ffn, hidden),
        shape=(count, hidden, ffn),
        how=TransposedExperts(),
    )
    yield stack.rule("linear_fc2.bias", "down_proj_bias", (count, hidden))


def config(model: ModelSpec) -> Config:
    """`GptOssConfig`, whose `intermediate_size` is the width of an expert."""
    attention, moe = require_grouped(model), require_experts(model)
    windows = [layer.window_tokens for layer in model.layers]
    window = attention.sliding_window
    return common_config(model, architecture="GptOssForCausalLM") | {
        "num_key_value_heads": attention.num_query_groups,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "sliding_window": None if window is None else window.window_tokens,
        "layer_types": ["full_attention" if tokens is None else "sliding_attention" for tokens in windows],
        "intermediate_size": moe.expert_ffn_hidden_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "swiglu_alpha": SWIGLU_ALPHA,
        "swiglu_limit": model.activation.clamp_limit,
    }
