"""How many parameters a model has, part by part, in total, active per token, and on one rank of a job.

Counted are trainable parameters. The expert bias of DeepSeek-V3's routing is none: Megatron-Core keeps it
as a buffer that is moved by a rule, not by a gradient (`TopKRouter.expert_bias`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from moe_bench.spec.model import Attention, ModelSpec
from moe_bench.spec.pipeline import Chunk, pipeline_chunks
from moe_bench.spec.recipe import KernelFamily, Recipe


class Part(StrEnum):
    """What a parameter or an operation belongs to. MTP modules are divided into the same parts."""

    INPUT_EMBEDDING = "input_embedding"
    ATTENTION = "attention"
    NORMS = "norms"
    ROUTER = "router"
    ROUTED_EXPERTS = "routed_experts"
    SHARED_EXPERTS = "shared_experts"
    DENSE_MLP = "dense_mlp"
    MTP_PROJECTION = "mtp_projection"
    LM_HEAD = "lm_head"


@dataclass(frozen=True, slots=True)
class Weights:
    """Parameters that tensor parallelism divides, and those that every tensor-parallel rank repeats."""

    sharded: int = 0
    replicated: int = 0

    @property
    def total(self) -> int:
        """Parameters of the whole, undivided part."""
        return self.sharded + self.replicated

    def on_rank(self, *, shards: int) -> int:
        """Parameters on one of `shards` tensor-parallel ranks."""
        return self.sharded // shards + self.replicated

    def __add__(self, other: Weights) -> Weights:
        return Weights(self.sharded + other.sharded, self.replicated + other.replicated)

    def __mul__(self, factor: int) -> Weights:
        return Weights(self.sharded * factor, self.replicated * factor)


PartWeights = Mapping[Part, Weights]


def grouped_query_attention_params(
    *, hidden: int, num_heads: int, num_query_groups: int, head_dim: int, qkv_bias: bool, output_bias: bool
) -> Weights:
    """Projections of grouped-query attention, without its norms and sinks.

    P = H d (n + 2 g) + n d H [+ d (n + 2 g)] [+ H]: arXiv:2305.13245. Megatron-Core divides heads over the
    tensor-parallel ranks and repeats the bias of the output projection.
    """
    qkv = head_dim * (num_heads + 2 * num_query_groups)
    sharded = hidden * qkv + num_heads * head_dim * hidden + qkv * qkv_bias
    return Weights(sharded, hidden * output_bias)


def multi_latent_attention_params(
    *,
    hidden: int,
    num_heads: int,
    q_rank: int | None,
    kv_rank: int,
    nope_dim: int,
    rope_dim: int,
    v_dim: int,
) -> Weights:
    """Projections of multi-head latent attention, without the norms on its latents.

    P = H r_q + r_q n (d_n + d_r) + H (r_kv + d_r) + r_kv n (d_n + d_v) + n d_v H, and H n (d_n + d_r) for the
    queries where they are not compressed: arXiv:2405.04434, 2.1. Megatron-Core repeats both down-projections
    on every tensor-parallel rank (`parallel_mode="duplicated"`, multi_latent_attention.py).
    """
    query = num_heads * (nope_dim + rope_dim)
    sharded = (q_rank or hidden) * query + kv_rank * num_heads * (nope_dim + v_dim)
    sharded += num_heads * v_dim * hidden
    return Weights(sharded, hidden * (q_rank or 0) + hidden * (kv_rank + rope_dim))


def attention_norm_params(attention: Attention) -> Weights:
    """RMSNorm gains inside attention: on MLA's latents, or on queries and keys.

    P = r_q + r_kv, or 2 d per head (one gain shared by all heads, Qwen3), or n d + g d over the whole vector
    (OLMoE). All are repeated on every tensor-parallel rank.
    """
    if attention.kind == "mla":
        return Weights(0, (attention.q_lora_rank or 0) + attention.kv_lora_rank)
    if attention.qk_norm == "whole_vector":
        return Weights(0, (attention.num_heads + attention.num_query_groups) * attention.head_dim)
    return Weights(0, 2 * attention.head_dim if attention.qk_norm == "per_head" else 0)


def has_query_input_norm(attention: Attention, family: KernelFamily | None) -> bool:
    """Whether a norm stands between a layer's input norm and the projection of uncompressed MLA queries.

    Only with Transformer Engine: Megatron-Core 0.19.2 resolves `qk_layernorm` without `q_lora_rank` to its
    fused norm and projection (transformer/mla_qk_norm_config.py:148), so DeepSeek-V2-Lite and Moonlight get H
    gains per layer that their authors' models do not have. The torch-native family builds none
    (harness/kernels/mla.py). `family` None is the model as published.
    """
    return attention.kind == "mla" and attention.q_lora_rank is None and family == "transformer_engine"


def gated_mlp_params(*, hidden: int, ffn: int, bias: bool) -> Weights:
    """One gated MLP or expert: gate, up and down projection.

    P = 3 H F [+ 2 F + H]: arXiv:2002.05202. The bias of the down projection is repeated on every rank.
    """
    return Weights(3 * hidden * ffn + 2 * ffn * bias, hidden * bias)


def router_params(*, hidden: int, num_experts: int, bias: bool) -> Weights:
    """The router's scores of all experts: P = H E [+ E], repeated on every rank."""
    return Weights(0, hidden * num_experts + num_experts * bias)


def embedding_params(*, hidden: int, vocab_size: int) -> Weights:
    """An embedding or LM head: P = V H, divided over the vocabulary, whose padding is left out."""
    return Weights(vocab_size * hidden)


def mtp_projection_params(*, hidden: int) -> Weights:
    """An MTP module's projection of hidden state and next embedding: P = 2 H H (arXiv:2412.19437, 2.2)."""
    return Weights(2 * hidden * hidden)


def layer_weights(
    model: ModelSpec, *, is_moe: bool, num_experts: int, family: KernelFamily | None
) -> PartWeights:
    """Parameters of one decoder layer, with `num_experts` of its routed experts counted.

    `family` is whose kernels build it (`has_query_input_norm`); None counts the model as published.
    """
    hidden = model.hidden_size
    num_norms = 2 + has_query_input_norm(model.attention, family)
    parts = {
        Part.ATTENTION: _attention_weights(model),
        Part.NORMS: Weights(0, num_norms * hidden) + attention_norm_params(model.attention),
    }
    if model.moe is None or not is_moe:
        ffn = model.dense_ffn_hidden_size or 0
        return parts | {Part.DENSE_MLP: gated_mlp_params(hidden=hidden, ffn=ffn, bias=model.linear_bias)}
    moe = model.moe
    expert = gated_mlp_params(hidden=hidden, ffn=moe.expert_ffn_hidden_size, bias=model.linear_bias)
    shared = gated_mlp_params(hidden=hidden, ffn=moe.shared_expert_ffn_hidden_size, bias=False)
    return parts | {
        Part.ROUTER: router_params(hidden=hidden, num_experts=moe.num_experts, bias=model.linear_bias),
        Part.ROUTED_EXPERTS: expert * num_experts,
        Part.SHARED_EXPERTS: shared + Weights(0, hidden * moe.shared_expert_gate),
    }


def _attention_weights(model: ModelSpec) -> Weights:
    attention = model.attention
    if attention.kind == "mla":
        return multi_latent_attention_params(
            hidden=model.hidden_size,
            num_heads=attention.num_heads,
            q_rank=attention.q_lora_rank,
            kv_rank=attention.kv_lora_rank,
            nope_dim=attention.qk_nope_head_dim,
            rope_dim=attention.qk_rope_head_dim,
            v_dim=attention.v_head_dim,
        )
    projections = grouped_query_attention_params(
        hidden=model.hidden_size,
        num_heads=attention.num_heads,
        num_query_groups=attention.num_query_groups,
        head_dim=attention.head_dim,
        qkv_bias=attention.qkv_bias,
        output_bias=model.linear_bias,
    )
    return projections + Weights(attention.num_heads * attention.sinks)


def mtp_weights(model: ModelSpec, *, num_experts: int, family: KernelFamily | None) -> PartWeights:
    """Parameters of one MTP module: two input norms, the projection, a decoder layer of the last layer's kind
    and a final norm (Megatron-Core's MultiTokenPredictionLayer). Embedding and head are the model's own.
    """
    own = {
        Part.MTP_PROJECTION: mtp_projection_params(hidden=model.hidden_size),
        Part.NORMS: Weights(0, 3 * model.hidden_size),
    }
    is_moe = model.is_moe_layer(model.num_layers - 1)
    layer = layer_weights(model, is_moe=is_moe, num_experts=num_experts, family=family)
    return sum_parts((own, layer))


def main_weights(model: ModelSpec, *, num_experts: int, family: KernelFamily | None) -> PartWeights:
    """Parameters of the model without MTP modules, with `num_experts` routed experts counted per layer."""
    whole = Chunk(
        pipeline_rank=0,
        virtual_stage=0,
        layers=tuple(range(model.num_layers)),
        has_embedding=True,
        has_loss=True,
        num_mtp_layers=0,
    )
    return chunk_weights(model, whole, num_experts=num_experts, trains_mtp=False, family=family)


def chunk_weights(
    model: ModelSpec, chunk: Chunk, *, num_experts: int, trains_mtp: bool, family: KernelFamily | None
) -> PartWeights:
    """Parameters that Megatron-Core's GPTModel allocates for one model chunk.

    A chunk with MTP modules holds its own copy of the input embedding, and a chunk with the loss one of a
    tied embedding, unless it is the first chunk (gpt_model.py); gradients keep such copies equal. The final
    norm stands behind the last decoder layer where MTP is trained, else before the loss
    (transformer_block.py).
    """
    embedding = embedding_params(hidden=model.hidden_size, vocab_size=model.vocab_size)
    parts: list[PartWeights] = [
        layer_weights(model, is_moe=model.is_moe_layer(layer), num_experts=num_experts, family=family)
        for layer in chunk.layers
    ]
    parts += [mtp_weights(model, num_experts=num_experts, family=family)] * chunk.num_mtp_layers
    if chunk.has_embedding or chunk.num_mtp_layers:
        parts.append({Part.INPUT_EMBEDDING: embedding})
    if chunk.has_loss and not (model.tied_embeddings and chunk.has_embedding):
        parts.append({Part.LM_HEAD: embedding})
    if (model.num_layers - 1 in chunk.layers) if trains_mtp else chunk.has_loss:
        parts.append({Part.NORMS: Weights(0, model.hidden_size)})
    return sum_parts(parts)


def sum_parts(parts: Iterable[PartWeights]) -> PartWeights:
    """The part-by-part sum; parts that occur nowhere are absent."""
    total: dict[Part, Weights] = {}
    for addend in parts:
        for part, weights in addend.items():
            total[part] = total.get(part, Weights()) + weights
    return {part: total[part] for part in Part if part in total}


def num_experts_per_layer(model: ModelSpec) -> int:
    """Routed experts of one expert layer; 0 for a dense model."""
    return 0 if model.moe is None else model.moe.num_experts


def num_active_experts(model: ModelSpec) -> int:
    """Routed experts that one token passes in one expert layer; 0 for a dense model."""
    return 0 if model.moe is None else model.moe.top_k


@dataclass(frozen=True, slots=True, kw_only=True)
class RankParams:
    """Parameters of one rank, by the group that shares their optimizer state."""

    dense: int
    """Everything but routed experts: sharded over data x context parallel ranks."""
    expert: int
    """Routed experts: sharded over the expert-data-parallel ranks."""


def rank_weights(recipe: Recipe, pipeline_rank: int) -> PartWeights:
    """Parameters of one pipeline rank before tensor and expert parallelism divide them."""
    model = recipe.model
    chunks = pipeline_chunks(
        recipe.parallel, num_layers=model.num_layers, num_mtp_layers=recipe.num_mtp_layers
    )
    return sum_parts(
        chunk_weights(
            model,
            chunk,
            num_experts=num_experts_per_layer(model),
            trains_mtp=recipe.num_mtp_layers > 0,
            family=recipe.kernels.family,
        )
        for chunk in chunks
        if chunk.pipeline_rank == pipeline_rank
    )


def rank_params(recipe: Recipe, pipeline_rank: int) -> RankParams:
    """Parameters that every rank of pipeline rank `pipeline_rank` holds.

    dense = sharded / TP + replicated; expert = (sharded / ETP + replicated) / EP.
    """
    parallel = recipe.parallel
    dense = expert = 0
    for part, weights in rank_weights(recipe, pipeline_rank).items():
        if part is Part.ROUTED_EXPERTS:
            expert = weights.on_rank(shards=parallel.expert_tensor) // parallel.expert
        else:
            dense += weights.on_rank(shards=parallel.tensor)
    return RankParams(dense=dense, expert=expert)
