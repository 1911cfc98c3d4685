"""How many parameters a model has, part by part, in total, active per token, and on one rank of a job.

Counted are trainable parameters. The expert bias of DeepSeek-V3's routing is none: Megatron-Core keeps it
as a buffer that is moved by a rule, not by a gradient (`TopKRouter.expert_bias`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum

from moe_bench.spec.mixer import Attention, CompressedAttention, GatedDeltaNet, Mamba2, SparseIndexer
from moe_bench.spec.model import LayerStructure, MixtureOfExperts, ModelSpec
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import KernelFamily, Recipe


class Part(StrEnum):
    """What a parameter or an operation belongs to. MTP modules are divided into the same parts."""

    INPUT_EMBEDDING = "input_embedding"
    ATTENTION = "attention"
    MAMBA = "mamba"
    GATED_DELTA_NET = "gated_delta_net"
    RESIDUAL_STREAMS = "residual_streams"
    NORMS = "norms"
    ROUTER = "router"
    LATENT_PROJECTIONS = "latent_projections"
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
    *,
    hidden: int,
    num_heads: int,
    num_query_groups: int,
    head_dim: int,
    qkv_bias: bool,
    output_bias: bool,
    output_gate: bool = False,
) -> Weights:
    """Projections of grouped-query attention, without its norms and sinks.

    P = H d (n + 2 g) + n d H [+ H d n] [+ d (n + 2 g)] [+ H]: arXiv:2305.13245, with a gate per channel of
    the output, and biases. Megatron-Core divides heads over the tensor-parallel ranks and repeats the bias of
    the output projection.
    """
    qkv = head_dim * (num_heads + 2 * num_query_groups)
    sharded = hidden * qkv + (1 + output_gate) * num_heads * head_dim * hidden + qkv * qkv_bias
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


def indexer_params(indexer: SparseIndexer, *, hidden: int, q_rank: int) -> Weights:
    """What chooses the keys of multi-head latent attention: P = r_q n d + H d + H n + 2 d.

    Queries from the compressed query, one key, a weight per head, and a norm with offset (arXiv:2512.02556,
    2.1). Megatron-Core repeats it on every tensor-parallel rank.
    """
    heads, dim = indexer.num_heads, indexer.head_dim
    return Weights(0, q_rank * heads * dim + hidden * (dim + heads) + 2 * dim)


def mamba_params(mamba: Mamba2, *, hidden: int) -> Weights:
    """One Mamba-2 mixer without the norm of its layer.

    P = H (2 d + 2 G N + n) + (d + 2 G N)(w + 1) + 3 n + d + d H: gate, input, both projections of the state
    and a time step per head; a biased convolution; decay, skip and time bias per head; a gated norm; the
    output (arXiv:2405.21060, 8; Megatron-Core's ssm/mamba_mixer.py, which divides all of it over heads).
    """
    inner, heads, channels = mamba.inner_width, mamba.num_heads, mamba.conv_channels
    projections = hidden * (inner + channels + heads) + inner * hidden
    return Weights(projections + channels * (mamba.conv_width + 1) + 3 * heads + inner)


def gated_delta_net_params(net: GatedDeltaNet, *, hidden: int) -> Weights:
    """One gated delta net without the norm of its layer.

    P = H (2 K + 2 V + 2 n_v) + (2 K + V) w + 2 n_v + d_v + V H: queries, keys, values, output gate, and two
    gates per head; a convolution; decay and time bias; a norm that all heads share; the output
    (arXiv:2412.06464; Megatron-Core's ssm/gated_delta_net, which divides all but the norm over heads).
    """
    keys, values, heads = net.key_width, net.value_width, net.num_value_heads
    projections = hidden * (2 * keys + 2 * values + 2 * heads) + values * hidden
    return Weights(projections + (2 * keys + values) * net.conv_width + 2 * heads, net.value_head_dim)


def compressed_attention_params(
    net: CompressedAttention, *, hidden: int, num_heads: int, head_dim: int, ratio: int
) -> Weights:
    """One attention of DeepSeek-V4 with its sinks and norms, compressing `ratio` tokens to a key.

    P = H r_q + r_q n d + H d + n d r_o + G r_o H + n + r_q + d, a compressor's 2 c H d + ratio c d + d, and
    at ratio 4 an indexer's r_q n_i d_i + H n_i + 4 H d_i + 8 d_i + d_i; c is 2 at ratio 4, 1 at 128
    (Megatron-LM dev, experimental_attention_variant/csa.py). It knows no tensor parallelism, so every rank
    repeats it.
    """
    heads = num_heads * head_dim
    own = net.q_lora_rank * (hidden + heads) + hidden * head_dim + num_heads + net.q_lora_rank + head_dim
    own += net.output_lora_rank * (heads + net.output_groups * hidden)
    if ratio:
        own += _compressor_params(hidden=hidden, head_dim=head_dim, ratio=ratio)
    if ratio == 4:
        own += net.q_lora_rank * net.num_index_heads * net.index_head_dim + hidden * net.num_index_heads
        own += _compressor_params(hidden=hidden, head_dim=net.index_head_dim, ratio=ratio)
    return Weights(0, own)


def _compressor_params(*, hidden: int, head_dim: int, ratio: int) -> int:
    """Keys and gates of `ratio` tokens, positions within them, and a norm; windows of 4 overlap by half."""
    width = (2 if ratio == 4 else 1) * head_dim
    return 2 * hidden * width + ratio * width + head_dim


def stream_mixing_params(*, hidden: int, num_streams: int) -> int:
    """The maps between n residual streams and a half layer: P = n H (n^2 + 2 n) + n^2 + 2 n + 3.

    DeepSeek-V4's hyper-connections; Megatron-LM dev, transformer/hyper_connection.py.
    """
    num_maps = num_streams**2 + 2 * num_streams
    return num_streams * hidden * num_maps + num_maps + 3


def stream_sum_params(*, hidden: int, num_streams: int) -> int:
    """What adds n residual streams up before a head: P = n^2 H + n + 1; nothing where there is one stream."""
    return num_streams**2 * hidden + num_streams + 1 if num_streams > 1 else 0


def mlp_params(*, hidden: int, ffn: int, bias: bool, is_gated: bool) -> Weights:
    """One MLP or expert: up and down projection, and a gate.

    P = 2 H F [+ F + H], and with a gate 3 H F [+ 2 F + H]: arXiv:2002.05202. The bias of the down projection
    is repeated on every rank.
    """
    return Weights((2 + is_gated) * hidden * ffn + (1 + is_gated) * ffn * bias, hidden * bias)


def router_params(*, hidden: int, num_experts: int, bias: bool) -> Weights:
    """The router's scores of all experts: P = H E [+ E], repeated on every rank."""
    return Weights(0, hidden * num_experts + num_experts * bias)


def mixing_params(*, hidden: int) -> Weights:
    """Logits of the weights of routed and shared experts: P = 2 H + 2, repeated on every rank."""
    return Weights(0, 2 * hidden + 2)


def position_params(*, hidden: int, num_positions: int) -> Weights:
    """Learned positions: P = S H, repeated on every rank (language_model_embedding.py)."""
    return Weights(0, num_positions * hidden)


def embedding_params(*, hidden: int, vocab_size: int) -> Weights:
    """An embedding or LM head: P = V H, divided over the vocabulary, whose padding is left out."""
    return Weights(vocab_size * hidden)


def mtp_projection_params(*, hidden: int) -> Weights:
    """An MTP module's projection of hidden state and next embedding: P = 2 H H (arXiv:2412.19437, 2.2)."""
    return Weights(2 * hidden * hidden)


def structure_weights(
    model: ModelSpec, structure: LayerStructure, *, num_experts: int | None, family: KernelFamily | None
) -> PartWeights:
    """Parameters of one layer, with `num_experts` or all of its routed experts, a norm before each half.

    `family` is whose kernels build it (`has_query_input_norm`); None counts the model as published.
    """
    hidden = model.hidden_size
    num_norms = (structure.mixer is not None) + (structure.ffn is not None)
    norms = Weights(0, num_norms * hidden * model.num_norm_vectors)
    parts: dict[Part, Weights] = {}
    if structure.mixer == "attention":
        parts[Part.ATTENTION] = _attention_weights(model, structure)
        inner = Weights(0, has_query_input_norm(model.attention, family) * hidden)
        norms += (inner + attention_norm_params(model.attention)) * model.num_norm_vectors
    elif structure.mixer == "compressed_attention" and model.compressed_attention is not None:
        parts[Part.ATTENTION] = compressed_attention_params(
            model.compressed_attention,
            hidden=hidden,
            num_heads=model.attention.num_heads,
            head_dim=key_width_of_head(model.attention),
            ratio=structure.compression_ratio or 0,
        )
    elif structure.mixer == "mamba" and model.mamba is not None:
        parts[Part.MAMBA] = mamba_params(model.mamba, hidden=hidden)
    elif structure.mixer == "gated_delta_net" and model.gated_delta_net is not None:
        parts[Part.GATED_DELTA_NET] = gated_delta_net_params(model.gated_delta_net, hidden=hidden)
    if structure.ffn == "dense":
        parts[Part.DENSE_MLP] = _mlp_weights(model, hidden, model.dense_ffn_hidden_size or 0)
    elif structure.ffn == "moe" and model.moe is not None:
        moe = model.moe.on_step(structure.step)
        parts |= _expert_weights(model, moe, moe.num_experts if num_experts is None else num_experts)
    if model.num_residual_streams > 1:
        maps = stream_mixing_params(hidden=hidden, num_streams=model.num_residual_streams)
        parts[Part.RESIDUAL_STREAMS] = Weights(0, num_norms * maps)
    return parts | {Part.NORMS: norms}


def key_width_of_head(attention: Attention) -> int:
    """Channels of one head's key, without those of MLA that carry positions."""
    return attention.head_dim if attention.kind == "gqa" else attention.qk_nope_head_dim


def _stream_sum_weights(model: ModelSpec) -> dict[Part, Weights]:
    number = model.num_residual_streams
    elements = stream_sum_params(hidden=model.hidden_size, num_streams=number)
    return {Part.RESIDUAL_STREAMS: Weights(0, elements)} if elements else {}


def _expert_weights(model: ModelSpec, moe: MixtureOfExperts, num_experts: int) -> dict[Part, Weights]:
    """Router, experts and, where experts work in a smaller width, the two projections around dispatch."""
    hidden = model.hidden_size
    gate = Weights(0, hidden * moe.shared_expert_gate)
    expert = _mlp_weights(model, model.expert_hidden_size, moe.expert_ffn_hidden_size)
    parts = {
        Part.ROUTER: router_params(hidden=hidden, num_experts=moe.num_experts, bias=model.router_bias),
        Part.ROUTED_EXPERTS: expert * num_experts,
        Part.SHARED_EXPERTS: gate,
    }
    if moe.shared_expert_ffn_hidden_size:
        parts[Part.SHARED_EXPERTS] += _mlp_weights(model, hidden, moe.shared_expert_ffn_hidden_size)
        if moe.shared_expert_mixing == "softmax":
            parts[Part.SHARED_EXPERTS] += mixing_params(hidden=hidden)
    if moe.latent_size is not None:
        # both are repeated on every tensor-parallel rank (transformer/moe/moe_layer.py, "duplicated")
        parts[Part.LATENT_PROJECTIONS] = Weights(0, 2 * hidden * moe.latent_size)
    return parts


def _mlp_weights(model: ModelSpec, hidden: int, ffn: int) -> Weights:
    return mlp_params(hidden=hidden, ffn=ffn, bias=model.linear_bias, is_gated=model.activation.is_gated)


def _attention_weights(model: ModelSpec, structure: LayerStructure) -> Weights:
    attention = model.attention
    if attention.kind == "mla":
        index = Weights()
        if attention.sparse is not None and structure.has_indexer:
            q_rank = attention.q_lora_rank or model.hidden_size
            index = indexer_params(attention.sparse, hidden=model.hidden_size, q_rank=q_rank)
        return index + multi_latent_attention_params(
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
        output_gate=attention.output_gate,
    )
    return projections + Weights(attention.num_heads * attention.sinks)


def mtp_weights(model: ModelSpec, *, num_experts: int | None, family: KernelFamily | None) -> PartWeights:
    """Parameters of one MTP module: two input norms, the projection, its layers and a final norm
    (Megatron-Core's MultiTokenPredictionLayer). Embedding and head are the model's own.
    """
    own = {
        Part.MTP_PROJECTION: mtp_projection_params(hidden=model.hidden_size),
        Part.NORMS: Weights(0, 3 * model.hidden_size * model.num_norm_vectors),
    }
    return sum_parts(
        (
            own,
            _stream_sum_weights(model),
            *(
                structure_weights(model, structure, num_experts=num_experts, family=family)
                for structure in model.mtp_layers
            ),
        )
    )


def main_weights(model: ModelSpec, *, num_experts: int | None, family: KernelFamily | None) -> PartWeights:
    """Parameters of the model without MTP modules, with `num_experts` or all routed experts of a layer."""
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
    model: ModelSpec, chunk: Chunk, *, num_experts: int | None, trains_mtp: bool, family: KernelFamily | None
) -> PartWeights:
    """Parameters that Megatron-Core's GPTModel allocates for one model chunk.

    A chunk with MTP modules holds its own copy of the input embedding, and a chunk with the loss one of a
    tied embedding, unless it is the first chunk (gpt_model.py); gradients keep such copies equal. The final
    norm stands behind the last decoder layer where MTP is trained, else before the loss
    (transformer_block.py).
    """
    embedding = embedding_params(hidden=model.hidden_size, vocab_size=model.vocab_size)
    parts: list[PartWeights] = [
        structure_weights(model, model.layer(layer), num_experts=num_experts, family=family)
        for layer in chunk.layers
    ]
    num_modules = model.num_mtp_modules(chunk.num_mtp_layers)
    parts += [mtp_weights(model, num_experts=num_experts, family=family)] * num_modules
    if chunk.has_embedding or chunk.num_mtp_layers:
        positions = model.max_position_embeddings if model.learned_positions else 0
        learned = position_params(hidden=model.hidden_size, num_positions=positions)
        parts.append({Part.INPUT_EMBEDDING: embedding + learned})
    if chunk.has_loss and not (model.tied_embeddings and chunk.has_embedding):
        parts.append({Part.LM_HEAD: embedding})
    if (model.num_layers - 1 in chunk.layers) if trains_mtp else chunk.has_loss:
        norm = Weights(0, model.hidden_size * model.num_norm_vectors)
        parts.append({Part.NORMS: norm} | _stream_sum_weights(model))
    return sum_parts(parts)


def sum_parts(parts: Iterable[PartWeights]) -> PartWeights:
    """The part-by-part sum; parts that occur nowhere are absent."""
    total: dict[Part, Weights] = {}
    for addend in parts:
        for part, weights in addend.items():
            total[part] = total.get(part, Weights()) + weights
    return {part: total[part] for part in Part if part in total}


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
    chunks = recipe.chunks()
    return sum_parts(
        chunk_weights(
            model,
            chunk,
            num_experts=None,
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
