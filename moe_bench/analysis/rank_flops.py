"""Floating-point operations that one rank spends in one optimizer step, by layer, part and kind of kernel.

Where `flops.py` counts what a model needs, whoever computes it, this counts what the kernels of one rank do:
the share that tensor, context, expert and pipeline parallelism leave it, recomputation, the scores that fused
attention computes again backward, and the zero columns of padded values. Routing is taken to be balanced.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from fractions import Fraction

from moe_bench.analysis.activations import multiplies_experts_row_wise, token_counts
from moe_bench.analysis.compressed_flops import (
    compressed_core_flops,
    compressed_projection_flops,
    index_score_flops,
    stream_mixing_flops,
)
from moe_bench.analysis.dispatch import MOE, dispatched_rows
from moe_bench.analysis.flops import CORE_ATTENTION, STATE_UPDATE, core_attention_flops
from moe_bench.analysis.params import Part
from moe_bench.analysis.projection_flops import indexer_projection_flops
from moe_bench.analysis.sparse_flops import indexer_score_flops, sparse_core_flops
from moe_bench.analysis.state_flops import delta_net_state_flops, mamba_state_flops
from moe_bench.spec.mixer import (
    Attention,
    CompressedAttention,
    GatedDeltaNet,
    Mamba2,
    MultiLatentAttention,
    SparseIndexer,
)
from moe_bench.spec.model import LayerStructure, MixtureOfExperts
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe, RecomputeModule

EXPERT_BIAS = "expert_bias"
"""Key of the products by which the torch-native kernels add each expert's bias to its rows."""
EXPERT_MIXING = "expert_mixing"
"""Key of the logits that weigh routed and shared experts, which no convention counts."""

Modules = frozenset[RecomputeModule]


class Kernel(StrEnum):
    """Kinds of kernels that the work is done by."""

    GEMM = "mm"
    GROUPED = "grouped GEMM"
    GROUPED_FP8 = "grouped GEMM in FP8"
    """With a scale per row; other formats are counted with `GROUPED`, whose kernels they take."""
    ATTENTION = "attention"
    STATE = "state update"
    """Of Mamba-2 and gated delta nets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankFlops:
    """One part of one layer over one optimizer step."""

    place: str
    """`decoder.<n>`, `mtp.<n>` or `output_layer`."""
    part: str
    kernel: Kernel
    forward_flops: int
    dgrad_flops: int
    wgrad_flops: int
    recompute_flops: int

    @property
    def total_flops(self) -> int:
        """All of it."""
        return self.forward_flops + self.dgrad_flops + self.wgrad_flops + self.recompute_flops


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """Operations of one part per micro batch, forward, and how many times as many its gradients take."""

    part: str
    kernel: Kernel
    flops: int
    dgrad_flops: int
    wgrad_flops: int
    repeated_by: Modules = frozenset()


def rank_flops(recipe: Recipe, pipeline_rank: int) -> tuple[RankFlops, ...]:
    """Everything that a rank of pipeline rank `pipeline_rank` multiplies in one step."""
    chunks = recipe.chunks()
    own = [chunk for chunk in chunks if chunk.pipeline_rank == pipeline_rank]
    return tuple(line for chunk in own for line in _chunk(recipe, chunk))


def _chunk(recipe: Recipe, chunk: Chunk) -> Iterator[RankFlops]:
    recompute = recipe.recompute
    is_uniform = recompute.granularity == "full" and recompute.method == "uniform"
    is_block = recompute.granularity == "full" and recompute.method == "block"
    for index, layer in enumerate(chunk.layers):
        is_whole = is_uniform or (is_block and index < recompute.num_layers)
        for product in _layer(recipe, recipe.model.layer(layer)):
            yield _over_the_step(recipe, f"decoder.{layer}", product, is_whole=is_whole)
    for index in range(chunk.num_mtp_layers):
        hidden = recipe.model.hidden_size
        projection = _gemm(recipe, Part.MTP_PROJECTION, _gathered(recipe), 2 * hidden * hidden)
        inner = (product for layer in recipe.model.mtp_layers for product in _layer(recipe, layer))
        for product in (projection, *inner):
            yield _over_the_step(recipe, f"mtp.{index}", product, is_whole=is_uniform)
    if chunk.has_loss:
        weights = recipe.model.vocab_size * recipe.model.hidden_size * (1 + recipe.num_mtp_layers)
        head = _gemm(recipe, Part.LM_HEAD, _gathered(recipe), weights)
        yield _over_the_step(recipe, "output_layer", head, is_whole=False)


def _over_the_step(recipe: Recipe, place: str, product: _Product, *, is_whole: bool) -> RankFlops:
    number = recipe.num_micro_batches
    modules = recipe.recompute.modules if recipe.recompute.granularity == "selective" else ()
    is_recomputed = is_whole or bool(product.repeated_by & set(modules))
    return RankFlops(
        place=place,
        part=product.part,
        kernel=product.kernel,
        forward_flops=number * product.flops,
        dgrad_flops=number * product.dgrad_flops,
        wgrad_flops=number * product.wgrad_flops,
        recompute_flops=number * product.flops * is_recomputed,
    )


def _gathered(recipe: Recipe) -> int:
    return token_counts(recipe).gathered


def _gemm(
    recipe: Recipe,
    part: str,
    rows: int,
    weights: int,
    *,
    is_split: bool = True,
    modules: Modules = frozenset(),
) -> _Product:
    """F = 2 rows weights / TP (`is_split`) forward, as much for each gradient."""
    flops = 2 * rows * weights // (recipe.parallel.tensor if is_split else 1)
    return _Product(
        part=part,
        kernel=Kernel.GEMM,
        flops=flops,
        dgrad_flops=flops,
        wgrad_flops=flops,
        repeated_by=modules,
    )


def _layer(recipe: Recipe, structure: LayerStructure) -> Iterator[_Product]:
    recipe = recipe.at(structure)
    model = recipe.model
    if structure.mixer == "attention":
        yield from _projections(recipe, model.attention)
        if model.attention.kind == "mla" and model.attention.sparse is not None:
            yield from _sparse(recipe, model.attention, model.attention.sparse, structure)
        else:
            yield _core(recipe, model.attention, structure)
    elif structure.mixer == "compressed_attention" and model.compressed_attention is not None:
        yield from _compressed(recipe, model.compressed_attention, structure.compression_ratio or 0)
    elif structure.mixer == "mamba" and model.mamba is not None:
        yield from _mamba(recipe, model.mamba)
    elif structure.mixer == "gated_delta_net" and model.gated_delta_net is not None:
        yield from _delta_net(recipe, model.gated_delta_net)
    if structure.ffn == "moe" and model.moe is not None:
        yield from _experts(recipe, model.moe)
    elif structure.ffn == "dense":
        weights = _num_matrices(recipe) * model.hidden_size * (model.dense_ffn_hidden_size or 0)
        yield _gemm(recipe, Part.DENSE_MLP, _gathered(recipe), weights, modules=frozenset({"mlp"}))
    if model.num_residual_streams > 1:
        num_halves = (structure.mixer is not None) + (structure.ffn is not None)
        maps = stream_mixing_flops(tokens=1, hidden=model.hidden_size, num_streams=model.num_residual_streams)
        tokens = token_counts(recipe).sharded
        yield _gemm(recipe, Part.RESIDUAL_STREAMS, tokens, num_halves * maps // 2, is_split=False)


def _sparse(
    recipe: Recipe, attention: MultiLatentAttention, indexer: SparseIndexer, structure: LayerStructure
) -> Iterator[_Product]:
    """Scores and values of chosen keys in the latent space / (TP CP), and what chooses them, which every
    tensor-parallel rank does whole (`sparse_flops`); backward as `_core`.
    """
    num_seqs, seq_len, context = recipe.micro_batch_size, recipe.seq_len, recipe.parallel.context
    flops = sparse_core_flops(
        num_seqs=num_seqs,
        seq_len=seq_len,
        num_heads=attention.num_heads,
        kv_rank=attention.kv_lora_rank,
        rope_dim=attention.qk_rope_head_dim,
        num_chosen_keys=indexer.num_chosen_keys,
    )
    yield _scores(flops // (recipe.parallel.tensor * context), backward=Fraction(5, 2))
    if structure.has_indexer:
        q_rank = attention.q_lora_rank or recipe.model.hidden_size
        per_token = indexer_projection_flops(
            tokens=1, hidden=recipe.model.hidden_size, q_rank=q_rank, indexer=indexer
        )
        tokens = token_counts(recipe).sharded
        yield _gemm(recipe, Part.ATTENTION, tokens, per_token // 2, is_split=False)
        scores = indexer_score_flops(num_seqs=num_seqs, seq_len=seq_len, indexer=indexer)
        yield _scores(scores // context, backward=Fraction(2))


def _scores(flops: int, *, backward: Fraction) -> _Product:
    """Work on pairs of tokens, and how many times as much of it the gradients take."""
    return _Product(
        part=CORE_ATTENTION,
        kernel=Kernel.ATTENTION,
        flops=flops,
        dgrad_flops=int(flops * backward),
        wgrad_flops=0,
        repeated_by=frozenset({"core_attn"}),
    )


def _compressed(recipe: Recipe, net: CompressedAttention, ratio: int) -> Iterator[_Product]:
    """All projections of this rank's tokens, and the scores of all its queries (`compressed_flops`); backward
    the chosen scores again and four products, of the indexer's the two products of a score.
    """
    attention = recipe.model.attention
    heads = attention.num_heads
    dim = attention.head_dim if attention.kind == "gqa" else attention.qk_nope_head_dim
    tokens, context = token_counts(recipe).sharded, recipe.parallel.context
    weights = compressed_projection_flops(
        tokens=1, hidden=recipe.model.hidden_size, num_heads=heads, head_dim=dim, net=net, ratio=ratio
    )
    yield _gemm(recipe, Part.ATTENTION, tokens, weights // 2, is_split=False)
    num_seqs, seq_len = recipe.micro_batch_size, recipe.seq_len
    core = compressed_core_flops(
        num_seqs=num_seqs, seq_len=seq_len, num_heads=heads, head_dim=dim, net=net, ratio=ratio
    )
    core //= context
    scores = index_score_flops(num_seqs=num_seqs, seq_len=seq_len, net=net, ratio=ratio) // context
    yield _scores(core, backward=Fraction(5, 2))
    if scores:
        yield _scores(scores, backward=Fraction(2))


def _num_matrices(recipe: Recipe) -> int:
    return 2 + recipe.model.activation.is_gated


def _mamba(recipe: Recipe, mamba: Mamba2) -> Iterator[_Product]:
    """2 T H (3 d + 2 G N + n) / TP of projections, and the state's updates (`mamba_state_flops`) / TP."""
    state_and_time = 2 * mamba.num_groups * mamba.state_size + mamba.num_heads
    weights = recipe.model.hidden_size * (3 * mamba.inner_width + state_and_time)
    yield _gemm(recipe, Part.MAMBA, _gathered(recipe), weights)
    flops = mamba_state_flops(tokens=_gathered(recipe), inner=mamba.inner_width, state_size=mamba.state_size)
    yield _state_update(recipe, flops)


def _delta_net(recipe: Recipe, net: GatedDeltaNet) -> Iterator[_Product]:
    """2 T (H (2 K + 3 V + 2 n_v) + w (2 K + V)) / TP of projections and convolution, and the state's updates
    (`delta_net_state_flops`) / TP.
    """
    weights = recipe.model.hidden_size * (2 * net.key_width + 3 * net.value_width + 2 * net.num_value_heads)
    weights += net.conv_width * (2 * net.key_width + net.value_width)
    yield _gemm(recipe, Part.GATED_DELTA_NET, _gathered(recipe), weights)
    yield _state_update(recipe, delta_net_state_flops(tokens=_gathered(recipe), net=net))


def _state_update(recipe: Recipe, whole_flops: int) -> _Product:
    """A rank's heads of the work on states, twice as much backward."""
    flops = whole_flops // recipe.parallel.tensor
    return _Product(part=STATE_UPDATE, kernel=Kernel.STATE, flops=flops, dgrad_flops=2 * flops, wgrad_flops=0)


def _projections(recipe: Recipe, attention: Attention) -> Iterator[_Product]:
    """2 T w / TP; MLA's down-projections are whole and see this rank's tokens only: 2 t w."""
    hidden, heads, rows = recipe.model.hidden_size, attention.num_heads, _gathered(recipe)
    if attention.kind == "gqa":
        channels = attention.head_dim * ((2 + attention.output_gate) * heads + 2 * attention.num_query_groups)
        yield _gemm(recipe, Part.ATTENTION, rows, hidden * channels)
        return
    query = heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    keys = heads * (attention.qk_nope_head_dim + attention.v_head_dim)
    up = (attention.q_lora_rank or hidden) * query + attention.kv_lora_rank * keys
    down = hidden * ((attention.q_lora_rank or 0) + attention.kv_lora_rank + attention.qk_rope_head_dim)
    yield _gemm(recipe, Part.ATTENTION, token_counts(recipe).sharded, down, is_split=False)
    yield _gemm(recipe, Part.ATTENTION, rows, up, modules=frozenset({"mla_up_proj"}))
    yield _gemm(recipe, Part.ATTENTION, rows, heads * attention.v_head_dim * hidden)


def _core(recipe: Recipe, attention: Attention, structure: LayerStructure) -> _Product:
    """Scores and their product with the values, F = 2 b n pairs (d_k + d_v) / (TP CP); backward the scores
    again and four products: 2 b n pairs (3 d_k + 2 d_v) / (TP CP) (arXiv:2307.08691, 3.1.2).

    The torch-native flash kernel takes values as wide as keys, so MLA's are padded (harness/kernels).
    """
    if attention.kind == "mla":
        qk_dim = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        v_dim = qk_dim if _pads_values(recipe) else attention.v_head_dim
    else:
        qk_dim = v_dim = attention.head_dim

    def flops(qk_channels: int, v_channels: int) -> int:
        whole = core_attention_flops(
            num_seqs=recipe.micro_batch_size,
            seq_len=recipe.seq_len,
            num_heads=attention.num_heads,
            qk_dim=qk_channels,
            v_dim=v_channels,
            window_tokens=structure.window_tokens,
            chunk_tokens=structure.chunk_tokens,
            causal_half=True,
        )
        return whole // (recipe.parallel.tensor * recipe.parallel.context)

    return _Product(
        part=CORE_ATTENTION,
        kernel=Kernel.ATTENTION,
        flops=flops(qk_dim, v_dim),
        dgrad_flops=flops(3 * qk_dim, 2 * v_dim),
        wgrad_flops=0,
        repeated_by=frozenset({"core_attn"}),
    )


def _pads_values(recipe: Recipe) -> bool:
    return recipe.kernels.is_torch_native and recipe.parallel.context == 1


def _expert_products(recipe: Recipe, flops: int) -> Iterator[_Product]:
    """Output, input's and weight's gradient of the routed experts; with scales per row the last in BF16."""
    plain = Kernel.GROUPED if recipe.kernels.grouped_gemm else Kernel.GEMM
    is_row_wise = multiplies_experts_row_wise(recipe)
    yield _Product(
        part=Part.ROUTED_EXPERTS,
        kernel=Kernel.GROUPED_FP8 if is_row_wise else plain,
        flops=flops,
        dgrad_flops=flops,
        wgrad_flops=0 if is_row_wise else flops,
        repeated_by=MOE,
    )
    if is_row_wise:
        yield _Product(part=Part.ROUTED_EXPERTS, kernel=plain, flops=0, dgrad_flops=0, wgrad_flops=flops)


def _experts(recipe: Recipe, moe: MixtureOfExperts) -> Iterator[_Product]:
    """Router 2 t H E; routed experts 6 r H F, r = t k rows received; shared experts 6 T H F_s / TP.

    Without a gate 4 stands for 6. Where routed experts work in a width l, 4 r l F and 2 t H l for each of the
    projections into it and back, which every tensor-parallel rank does for its own tokens. ETP ranks compute
    each other's rows with their share of F, which comes to the same. The torch-native kernels add biases as a
    product with the rows' experts, one-hot: 2 r E (2 F + H) / EP, and as much for the bias's gradient. Two
    logits weigh routed and shared experts, 4 t H for either (harness/kernels/shared_experts.py).
    """
    model = recipe.model
    hidden, expert = model.hidden_size, MOE
    sharded, rows = token_counts(recipe).sharded, dispatched_rows(recipe, moe)
    yield _gemm(recipe, Part.ROUTER, sharded, hidden * moe.num_experts, is_split=False, modules=expert)
    flops = 2 * _num_matrices(recipe) * rows * model.expert_hidden_size * moe.expert_ffn_hidden_size
    yield from _expert_products(recipe, flops)
    if model.linear_bias and recipe.kernels.family == "torch_native":
        etp = recipe.parallel.expert_tensor
        num_experts = moe.num_experts // recipe.parallel.expert
        first = (1 + model.activation.is_gated) * moe.expert_ffn_hidden_size // etp
        bias = 2 * rows * etp * num_experts * (first + hidden)
        yield _Product(
            part=EXPERT_BIAS,
            kernel=Kernel.GEMM,
            flops=bias,
            dgrad_flops=0,
            wgrad_flops=bias,
            repeated_by=expert,
        )
    if moe.latent_size is not None:
        latent = 2 * hidden * moe.latent_size
        yield _gemm(recipe, Part.LATENT_PROJECTIONS, sharded, latent, is_split=False, modules=expert)
    if moe.shared_expert_ffn_hidden_size:
        weights = _num_matrices(recipe) * hidden * moe.shared_expert_ffn_hidden_size
        yield _gemm(recipe, Part.SHARED_EXPERTS, _gathered(recipe), weights, modules=MOE | {"shared_experts"})
        if moe.shared_expert_mixing == "softmax":
            yield _gemm(recipe, EXPERT_MIXING, 2 * sharded, 2 * hidden, is_split=False, modules=MOE)
