"""The parts that model families share, as rules: attention of both kinds, MLPs, experts, MTP modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moe_bench.checkpoints.rule import GroupedQkv, Place, Rule, Stacked
from moe_bench.errors import BadInputError
from moe_bench.spec.mixer import GroupedQueryAttention, MultiLatentAttention
from moe_bench.spec.model import MixtureOfExperts, ModelSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertNames:
    """What a family calls the parts of its expert layers, below `model.layers.<n>.`."""

    block: str = "mlp."
    router: str = "gate"
    gate: str = "gate_proj"
    linear: str = "up_proj"
    down: str = "down_proj"


LayerRules = Callable[[ModelSpec, Place, bool], Iterator[Rule]]
"""Rules of one decoder layer: the model, where the layer stands, and whether it has experts."""


def model_rules(model: ModelSpec, layer_rules: LayerRules, *, num_mtp_layers: int) -> Iterator[Rule]:
    """All tensors of a model whose Hugging Face class has the usual frame.

    Prediction modules follow the decoder layers there, `model.layers.<num_layers + depth>`, each with copies
    of the embedding and the head that it shares with the model.
    """
    top = Place(megatron="", huggingface="")
    table, width = (model.vocab_size, model.hidden_size), (model.hidden_size,)
    mtp_places = [f"model.layers.{model.num_layers + depth}." for depth in range(num_mtp_layers)]
    heads = tuple(f"{place}shared_head.head.weight" for place in mtp_places)
    tables = tuple(f"{place}embed_tokens.weight" for place in mtp_places)
    if model.tied_embeddings:
        tables, heads = (*tables, "lm_head.weight", *heads), ()
    yield top.rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", table, copies=tables)
    for layer in range(model.num_layers):
        place = Place(megatron=f"decoder.layers.{layer}.", huggingface=f"model.layers.{layer}.")
        yield from layer_rules(model, place, model.is_moe_layer(layer))
    yield top.rule("decoder.final_layernorm.weight", "model.norm.weight", width)
    for depth, prefix in enumerate(mtp_places):
        yield from _mtp_rules(model, layer_rules, depth, prefix)
    if not model.tied_embeddings:
        yield top.rule("output_layer.weight", "lm_head.weight", table, copies=heads)


def _mtp_rules(model: ModelSpec, layer_rules: LayerRules, depth: int, prefix: str) -> Iterator[Rule]:
    module = Place(megatron=f"mtp.layers.{depth}.", huggingface=prefix)
    hidden = model.hidden_size
    yield module.rule("enorm.weight", "enorm.weight", (hidden,))
    yield module.rule("hnorm.weight", "hnorm.weight", (hidden,))
    yield module.rule("eh_proj.weight", "eh_proj.weight", (hidden, 2 * hidden))
    layer = Place(megatron=f"{module.megatron}transformer_layer.", huggingface=prefix)
    yield from layer_rules(model, layer, model.is_moe_layer(model.num_layers - 1))
    yield module.rule("final_layernorm.weight", "shared_head.norm.weight", (hidden,))


def grouped_layer(
    model: ModelSpec,
    layer: Place,
    has_experts: bool,
    *,
    names: ExpertNames = ExpertNames(),
    whole_vector_norm: bool = False,
) -> Iterator[Rule]:
    """A decoder layer of grouped-query attention, and experts or a dense MLP."""
    yield from grouped_attention(model, layer, whole_vector_norm=whole_vector_norm)
    yield from expert_layer(model, layer, names) if has_experts else dense_mlp(model, layer)


def grouped_attention(model: ModelSpec, layer: Place, *, whole_vector_norm: bool = False) -> Iterator[Rule]:
    """Grouped-query attention: norm in front, joined projections, their biases, norms on queries and keys."""
    attention = require_grouped(model)
    groups, head_dim, hidden = attention.num_query_groups, attention.head_dim, model.hidden_size
    q_width, k_width = attention.num_heads * head_dim, groups * head_dim
    qkv = GroupedQkv(
        num_query_groups=groups, heads_per_group=attention.num_heads // groups, head_dim=head_dim
    )
    yield layer.rule("self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight", (hidden,))
    yield layer.rule(
        "self_attention.linear_qkv.weight",
        tuple(f"self_attn.{part}_proj.weight" for part in "qkv"),
        (q_width, hidden),
        (k_width, hidden),
        (k_width, hidden),
        how=qkv,
    )
    if attention.qkv_bias:
        yield layer.rule(
            "self_attention.linear_qkv.bias",
            tuple(f"self_attn.{part}_proj.bias" for part in "qkv"),
            (q_width,),
            (k_width,),
            (k_width,),
            how=qkv,
        )
    if attention.qk_norm != "none":
        q_norm, k_norm = (q_width, k_width) if whole_vector_norm else (head_dim, head_dim)
        yield layer.rule("self_attention.q_layernorm.weight", "self_attn.q_norm.weight", (q_norm,))
        yield layer.rule("self_attention.k_layernorm.weight", "self_attn.k_norm.weight", (k_norm,))
    yield layer.rule("self_attention.linear_proj.weight", "self_attn.o_proj.weight", (hidden, q_width))


def latent_attention(model: ModelSpec, layer: Place) -> Iterator[Rule]:
    """Multi-latent attention: both sides pair neighbours in the rotating part, so that nothing moves."""
    attention = require_latent(model)
    hidden, heads, latent = model.hidden_size, attention.num_heads, attention.kv_lora_rank
    q_width = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    kv_width = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    here = Place(megatron=f"{layer.megatron}self_attention.", huggingface=f"{layer.huggingface}self_attn.")
    yield layer.rule("input_layernorm.weight", "input_layernorm.weight", (hidden,))
    if (rank := attention.q_lora_rank) is None:
        yield here.rule("linear_q_proj.weight", "q_proj.weight", (q_width, hidden))
    else:
        yield here.rule("linear_q_down_proj.weight", "q_a_proj.weight", (rank, hidden))
        yield here.rule("linear_q_up_proj.layer_norm_weight", "q_a_layernorm.weight", (rank,))
        yield here.rule("linear_q_up_proj.weight", "q_b_proj.weight", (q_width, rank))
    down = (latent + attention.qk_rope_head_dim, hidden)
    yield here.rule("linear_kv_down_proj.weight", "kv_a_proj_with_mqa.weight", down)
    yield here.rule("linear_kv_up_proj.layer_norm_weight", "kv_a_layernorm.weight", (latent,))
    yield here.rule("linear_kv_up_proj.weight", "kv_b_proj.weight", (kv_width, latent))
    yield here.rule("linear_proj.weight", "o_proj.weight", (hidden, heads * attention.v_head_dim))


def dense_mlp(model: ModelSpec, layer: Place) -> Iterator[Rule]:
    """The norm and the MLP of a layer without experts."""
    if model.dense_ffn_hidden_size is None:
        raise BadInputError(f"{model.key}: dense_ffn_hidden_size: null, but it has layers without experts")
    norm = "mlp.linear_fc1.layer_norm_weight"
    yield layer.rule(norm, "post_attention_layernorm.weight", (model.hidden_size,))
    yield from _gated_mlp(layer, "mlp.", "mlp.", hidden=model.hidden_size, ffn=model.dense_ffn_hidden_size)


def expert_layer(model: ModelSpec, layer: Place, names: ExpertNames) -> Iterator[Rule]:
    """The norm, the router, every expert by itself, and the shared experts."""
    moe = require_experts(model)
    hidden, ffn, count = model.hidden_size, moe.expert_ffn_hidden_size, moe.num_experts
    yield layer.rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", (hidden,))
    router = f"{names.block}{names.router}"
    yield layer.rule("mlp.router.weight", f"{router}.weight", (count, hidden))
    if moe.router.expert_bias:
        yield layer.rule("mlp.router.expert_bias", f"{router}.e_score_correction_bias", (count,))
    stack = Place(
        megatron=f"{layer.megatron}mlp.experts.experts.",
        huggingface=f"{layer.huggingface}{names.block}experts.",
    )
    for expert in range(count):
        gate_and_linear = tuple(f"{expert}.{part}.weight" for part in (names.gate, names.linear))
        which = {"expert": expert, "num_experts": count}
        yield stack.rule(
            "linear_fc1.weight", gate_and_linear, (ffn, hidden), (ffn, hidden), how=Stacked(), **which
        )
        yield stack.rule("linear_fc2.weight", f"{expert}.{names.down}.weight", (hidden, ffn), **which)
    if moe.shared_expert_ffn_hidden_size:
        yield from _gated_mlp(
            layer,
            "mlp.shared_experts.",
            f"{names.block}shared_experts.",
            hidden=hidden,
            ffn=moe.shared_expert_ffn_hidden_size,
        )


def _gated_mlp(layer: Place, megatron: str, huggingface: str, *, hidden: int, ffn: int) -> Iterator[Rule]:
    yield layer.rule(
        f"{megatron}linear_fc1.weight",
        (f"{huggingface}gate_proj.weight", f"{huggingface}up_proj.weight"),
        (ffn, hidden),
        (ffn, hidden),
        how=Stacked(),
    )
    yield layer.rule(f"{megatron}linear_fc2.weight", f"{huggingface}down_proj.weight", (hidden, ffn))


def require_grouped(model: ModelSpec) -> GroupedQueryAttention:
    """The model's attention; BadInputError where it is not grouped-query attention."""
    if model.attention.kind != "gqa":
        raise BadInputError(f"{model.key}: hf_model_type {model.hf_model_type} has no {model.attention.kind}")
    return model.attention


def require_latent(model: ModelSpec) -> MultiLatentAttention:
    """The model's attention; BadInputError where it is not multi-latent attention."""
    if model.attention.kind != "mla":
        raise BadInputError(f"{model.key}: hf_model_type {model.hf_model_type} has no {model.attention.kind}")
    return model.attention


def require_experts(model: ModelSpec) -> MixtureOfExperts:
    """The model's experts; BadInputError where it has none."""
    if model.moe is None:
        raise BadInputError(f"{model.key}: hf_model_type {model.hf_model_type} needs experts")
    return model.moe
