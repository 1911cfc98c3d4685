"""Bytes that a micro batch leaves behind for its backward pass, tensor by tensor, and the most at once.

The table holds for BF16 or FP32 activations, no dropout, attention that keeps no score matrix (flash) unless
`kernels.attention` is `unfused`, fused permutation, probabilities applied inside the experts' activation, and
balanced routing. It was compared with the measured rows of MooreThreads/SimuMax (4dcaae5) on eight B200:
dense layers within 1 %, four-layer DeepSeek models 12 % low in everything that is not state (the dispatch and
combine buffers of the backward pass are the suspects). Offloaded activations are not credited.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_bench.spec.model import GroupedQueryAttention, MixtureOfExperts, MultiLatentAttention
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe, RecomputeModule


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """One tensor that a layer keeps per micro batch, and the recompute modules that do without it."""

    name: str
    saved_bytes: int
    freed_by: frozenset[RecomputeModule] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Tokens of one micro batch that one rank works on."""

    gathered: int
    """T = S b / CP, inside attention and MLPs."""
    sharded: int
    """t = T / TP with sequence parallelism, else T: around norms, residuals and routing."""


def token_counts(recipe: Recipe) -> TokenCounts:
    """Tokens per micro batch and rank: T = S b / CP and t = T / TP (arXiv:2205.05198, 4.2.2)."""
    parallel = recipe.parallel
    gathered = recipe.seq_len * recipe.micro_batch_size // parallel.context
    sharded = gathered // parallel.tensor if parallel.sequence_parallel else gathered
    return TokenCounts(gathered=gathered, sharded=sharded)


def activation_element_bytes(recipe: Recipe) -> int:
    """Bytes of one activation element: 4 in FP32, 2 otherwise."""
    return 4 if recipe.precision == "fp32" else 2


def attention_tensors(recipe: Recipe) -> tuple[SavedTensor, ...]:
    """What the attention half of a layer keeps."""
    attention = recipe.model.attention
    if attention.kind == "mla":
        return _residual_tensors(recipe, "attention", norm_is_separate=True) + _mla_tensors(recipe, attention)
    return _residual_tensors(
        recipe, "attention", norm_is_separate=_norms_are_separate(recipe)
    ) + _gqa_tensors(recipe, attention)


def _norms_are_separate(recipe: Recipe) -> bool:
    """Whether norms are modules of their own; Transformer Engine fuses them into the next projection, which
    keeps the normalised input whatever is recomputed.
    """
    return recipe.kernels.family != "transformer_engine"


def _residual_tensors(recipe: Recipe, half: str, *, norm_is_separate: bool) -> tuple[SavedTensor, ...]:
    """Input of a half layer, kept by its norm, and the norm's output, kept by the projection: a t H each."""
    num_bytes = activation_element_bytes(recipe) * token_counts(recipe).sharded * recipe.model.hidden_size
    freed_by: frozenset[RecomputeModule] = frozenset({"layernorm"} if norm_is_separate else ())
    return (
        SavedTensor(f"{half}_input", num_bytes),
        SavedTensor(f"{half}_norm_output", num_bytes, freed_by),
    )


def _core_tensors(recipe: Recipe, *, num_heads: int, v_dim: int) -> tuple[SavedTensor, ...]:
    """The core's output, a T n d_v / TP, and log-sum-exp, 4 T n / TP, or all scores where it is not fused."""
    tokens = token_counts(recipe).gathered
    element = activation_element_bytes(recipe)
    heads = num_heads // recipe.parallel.tensor
    statistics_bytes = 4 * tokens * heads
    if recipe.kernels.attention == "unfused":
        statistics_bytes = element * tokens * heads * recipe.seq_len
    return (
        SavedTensor("attention_output", element * tokens * heads * v_dim),
        SavedTensor("attention_statistics", statistics_bytes, frozenset({"core_attn"})),
    )


def _mla_tensors(recipe: Recipe, attention: MultiLatentAttention) -> tuple[SavedTensor, ...]:
    """Latents before and after their norms, a (t + T)(r_q + r_kv) + a t d_r, and the queries, keys and
    values, a T (n / TP)(2 (d_n + d_r) + d_v), which `mla_up_proj` computes again.
    """
    counts = token_counts(recipe)
    element = activation_element_bytes(recipe)
    latent = (attention.q_lora_rank or 0) + attention.kv_lora_rank
    heads = attention.num_heads // recipe.parallel.tensor
    qk_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    latents_bytes = (counts.sharded + counts.gathered) * latent + counts.sharded * attention.qk_rope_head_dim
    qkv_elements = counts.gathered * heads * (2 * qk_dim + attention.v_head_dim)
    return (
        SavedTensor("latents", element * latents_bytes),
        SavedTensor("queries_keys_values", element * qkv_elements, frozenset({"mla_up_proj"})),
        *_core_tensors(recipe, num_heads=attention.num_heads, v_dim=attention.v_head_dim),
    )


def _gqa_tensors(recipe: Recipe, attention: GroupedQueryAttention) -> tuple[SavedTensor, ...]:
    """Queries, keys and values, a T d (n + 2 g) / TP, and the inputs of their norms, a T d (n + g) / TP."""
    scale = activation_element_bytes(recipe) * token_counts(recipe).gathered * attention.head_dim
    heads, groups, tensor = attention.num_heads, attention.num_query_groups, recipe.parallel.tensor
    saved = [SavedTensor("queries_keys_values", scale * (heads + 2 * groups) // tensor)]
    if attention.qk_norm != "none":
        saved.append(SavedTensor("qk_norm_input", scale * (heads + groups) // tensor))
    return (*saved, *_core_tensors(recipe, num_heads=heads, v_dim=attention.head_dim))


def dense_mlp_tensors(recipe: Recipe) -> tuple[SavedTensor, ...]:
    """What the dense MLP half of a layer keeps: gate and up, 2 a T F / TP, and their product, a T F / TP."""
    ffn = recipe.model.dense_ffn_hidden_size or 0
    hidden_elements = 3 * token_counts(recipe).gathered * ffn // recipe.parallel.tensor
    mlp = SavedTensor("mlp_hidden", activation_element_bytes(recipe) * hidden_elements, frozenset({"mlp"}))
    return (*_residual_tensors(recipe, "mlp", norm_is_separate=_norms_are_separate(recipe)), mlp)


def expert_tensors(recipe: Recipe, moe: MixtureOfExperts) -> tuple[SavedTensor, ...]:
    """What the expert half of a layer keeps, for k chosen experts per token.

    Scores 4 t E; dispatched tokens t k H ETP (ETP ranks gather each other's); gate and up 2 t k F; their
    product t k F; probabilities and row maps 8 t k; shared experts 3 T F_s / TP. Expert parallelism does not
    lower these: ranks trade tokens, they do not shed them. FP8 and FP4 keep the inputs of the expert GEMMs at
    one byte per element.
    """
    counts = token_counts(recipe)
    element = activation_element_bytes(recipe)
    gemm_input = element if recipe.precision in ("fp32", "bf16") else 1
    copies = expert_token_copies(recipe, moe)
    expert: frozenset[RecomputeModule] = frozenset({"moe"})
    ffn_elements = copies * moe.expert_ffn_hidden_size
    shared_elements = 3 * counts.gathered * moe.shared_expert_ffn_hidden_size // recipe.parallel.tensor
    dispatched = copies * recipe.model.hidden_size * recipe.parallel.expert_tensor
    return (
        *_residual_tensors(recipe, "experts", norm_is_separate=True),
        SavedTensor("router_scores", 4 * counts.sharded * moe.num_experts, expert),
        SavedTensor("dispatched_tokens", gemm_input * dispatched, expert),
        SavedTensor("expert_gate_up", 2 * element * ffn_elements, expert),
        SavedTensor("expert_product", gemm_input * ffn_elements, expert | {"moe_act"}),
        SavedTensor("routing_maps", 8 * counts.sharded * moe.top_k, expert),
        SavedTensor("shared_expert_hidden", element * shared_elements, expert | {"shared_experts"}),
    )


def expert_token_copies(recipe: Recipe, moe: MixtureOfExperts) -> int:
    """Tokens that a rank's experts receive per micro batch: t k, times the capacity factor where experts are
    padded to their capacity. Balanced routing is assumed.
    """
    copies = token_counts(recipe).sharded * moe.top_k
    drop = recipe.token_drop
    return round(copies * drop.capacity_factor) if drop is not None and drop.pad_to_capacity else copies


def layer_tensors(recipe: Recipe, *, is_moe: bool) -> tuple[SavedTensor, ...]:
    """Everything that one decoder layer would keep if nothing were recomputed."""
    moe = recipe.model.moe
    second_half = expert_tensors(recipe, moe) if is_moe and moe is not None else dense_mlp_tensors(recipe)
    return attention_tensors(recipe) + second_half


def kept_bytes(tensors: Iterable[SavedTensor], modules: Iterable[RecomputeModule]) -> int:
    """Bytes that stay when `modules` are recomputed."""
    recomputed = set(modules)
    return sum(tensor.saved_bytes for tensor in tensors if not tensor.freed_by & recomputed)


def chunk_activation_bytes(recipe: Recipe, chunk: Chunk) -> int:
    """Bytes that one micro batch leaves in one model chunk.

    MTP modules add their two norm inputs, the concatenated vector and a final norm's input and output: 6 a t
    H. The loss adds the final norm's input and output: 2 a t H.
    """
    model = recipe.model
    kinds = [model.is_moe_layer(layer) for layer in chunk.layers]
    mtp_kinds = [model.is_moe_layer(model.num_layers - 1)] * chunk.num_mtp_layers
    vector_bytes = activation_element_bytes(recipe) * token_counts(recipe).sharded * model.hidden_size
    return (
        _layers_bytes(recipe, kinds)
        + _layers_bytes(recipe, mtp_kinds)
        + 6 * vector_bytes * chunk.num_mtp_layers
        + 2 * vector_bytes * chunk.has_loss
    )


def _layers_bytes(recipe: Recipe, kinds: Sequence[bool]) -> int:
    recompute = recipe.recompute
    if recompute.granularity != "full":
        modules = recompute.modules if recompute.granularity == "selective" else ()
        return sum(kept_bytes(layer_tensors(recipe, is_moe=is_moe), modules) for is_moe in kinds)
    input_bytes = layer_tensors(recipe, is_moe=False)[0].saved_bytes
    if recompute.method == "uniform":
        num_units = -(-len(kinds) // max(1, recompute.num_layers))
        return num_units * input_bytes
    num_recomputed = min(len(kinds), recompute.num_layers)
    whole = sum(kept_bytes(layer_tensors(recipe, is_moe=is_moe), ()) for is_moe in kinds[num_recomputed:])
    return num_recomputed * input_bytes + whole


def peak_in_flight_bytes(
    chunk_bytes: Sequence[int],
    *,
    num_micro_batches: int,
    pipeline: int,
    pipeline_rank: int,
    group_size: int,
    overlaps_expert_parallel: bool,
) -> int:
    """The most that forward passes without their backward pass hold at once on one pipeline rank.

    `chunk_bytes` are the bytes per micro batch of the rank's model chunks. 1F1B holds min(m, PP - rank)
    micro batches. The interleaved schedule warms up with 2 (PP - rank - 1) + (VPP - 1) G forward passes of
    chunks, in groups of G micro batches per chunk, then alternates; overlapping expert parallelism adds one
    (Megatron-Core schedules.py, get_pp_rank_microbatches and get_schedule_table). The schedule is walked
    pass by pass, so chunks may differ in size.

    Where expert parallelism overlaps, a forward and a backward pass run layer by layer beside one another
    (model_chunk_schedule_plan.py: forward layer i with backward layer L - 1 - i), so what comes and what goes
    never both stand whole; the one layer that they share is left out. Published on 16 H100, Qwen3-30B-A3B:
    61.4 GiB without overlap, 62.2 GiB with it (rows mbskill-qwen3-30b-a3b-h100-16gpu-*).
    """
    if len(chunk_bytes) == 1:
        return min(num_micro_batches, pipeline - pipeline_rank) * chunk_bytes[0]
    num_chunks = len(chunk_bytes)
    forward = [
        chunk
        for first in range(0, num_micro_batches, group_size)
        for chunk in range(num_chunks)
        for _ in range(min(group_size, num_micro_batches - first))
    ]
    num_warmup = 2 * (pipeline - pipeline_rank - 1) + (num_chunks - 1) * group_size
    num_warmup += int(overlaps_expert_parallel)
    live = peak = 0
    for index, chunk in enumerate(forward):
        leaves = 0
        if index >= num_warmup:
            leaves = chunk_bytes[num_chunks - 1 - forward[index - num_warmup]]
        arrives = chunk_bytes[chunk]
        both = max(arrives - leaves, 0) if overlaps_expert_parallel else arrives
        peak = max(peak, live + both)
        live += arrives - leaves
    return peak
