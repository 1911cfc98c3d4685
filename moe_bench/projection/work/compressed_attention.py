"""DeepSeek-V4's attention half as operations, and the mixing of its residual streams."""

from __future__ import annotations

from moe_bench.analysis.activations import token_counts
from moe_bench.analysis.compressed_flops import compressed_core_flops, index_score_flops
from moe_bench.projection.work.attention import add_norm_and_residual
from moe_bench.projection.work.operations import Number, Part
from moe_bench.projection.work.sparse_core import CORE_GRADIENT, SCORE_GRADIENT, add_scores, add_selection
from moe_bench.projection.work.tally import Modules, Tally
from moe_bench.spec.mixer import CompressedAttention
from moe_bench.spec.model import LayerStructure

_UP: Modules = frozenset({"mla_up_proj"})
_BYTES = 2
_PART = Part.ATTENTION_PROJECTIONS
_QUERY_PASSES = 6
"""Times that the heads' channels are read or written beside the core: norm and rotary embedding of queries,
inverse rotary embedding of the output (Megatron-LM dev, experimental_attention_variant/csa.py)."""
_COMPRESSOR_PASSES = 3
"""The same of a compressor's channels: written by its product are values and weights, then softmax, sum."""
_LAUNCHES = 110
_COMPRESSOR_LAUNCHES = 20
_STREAM_LAUNCHES = 20
"""Kernels of the attention half, of a compressor and of one mixing of streams, forward and backward; counted
in Megatron-LM dev's csa.py and hyper_connection.py (fused) to about a fifth."""


def add_compressed_attention(tally: Tally, net: CompressedAttention, structure: LayerStructure) -> None:
    """Norm, low-rank queries, one head of keys that are their values, compressors, core and output: every
    tensor-parallel rank runs all of it (`analysis/compressed_flops.py` counts the same).
    """
    recipe = tally.recipe
    model, rows = recipe.model, token_counts(recipe).sharded
    attention, hidden, ratio = model.attention, model.hidden_size, structure.compression_ratio or 0
    dim = attention.head_dim if attention.kind == "gqa" else attention.qk_nope_head_dim
    heads = attention.num_heads * dim
    add_norm_and_residual(tally, _BYTES * rows * hidden)
    tally.gemm(_PART, rows, hidden, net.q_lora_rank)
    tally.gemm(_PART, rows, net.q_lora_rank, heads, repeated_by=_UP)
    tally.gemm(_PART, rows, hidden, dim)
    moved = _QUERY_PASSES * _BYTES * rows * heads
    tally.move(_PART, forward_bytes=moved, backward_bytes=moved, repeated_by=_UP)
    if ratio:
        _add_compressor(tally, rows, hidden, 2 * (2 if ratio == 4 else 1) * dim)
    num_seqs, seq_len, context = recipe.micro_batch_size, recipe.seq_len, recipe.parallel.context
    num_far = {0: 0, 4: min(net.index_top_k, seq_len // 4), 128: seq_len // 128}[ratio]
    if ratio == 4:
        tally.gemm(_PART, rows, net.q_lora_rank, net.num_index_heads * net.index_head_dim)
        tally.gemm(_PART, rows, hidden, net.num_index_heads)
        _add_compressor(tally, rows, hidden, 4 * net.index_head_dim)
        scores = index_score_flops(num_seqs=num_seqs, seq_len=seq_len, net=net, ratio=ratio)
        add_scores(tally, scores / context, seq_len // ratio, gradient=SCORE_GRADIENT)
        add_selection(tally, num_keys=seq_len // ratio)
    core = compressed_core_flops(
        num_seqs=num_seqs, seq_len=seq_len, num_heads=attention.num_heads, head_dim=dim, net=net, ratio=ratio
    )
    add_scores(tally, core / context, net.window_tokens + num_far, gradient=CORE_GRADIENT)
    tally.gemm(_PART, rows, heads, net.output_lora_rank)
    tally.gemm(_PART, rows, net.output_groups * net.output_lora_rank, hidden)
    tally.launch(_LAUNCHES, captured_by="attn")


def add_stream_mixing(tally: Tally, num_streams: int) -> None:
    """One half layer's maps between n residual streams and itself (`stream_mixing_flops`), fused.

    Forward the streams are read for their sum, which is written; then read with the half layer's output, and
    written: (3 n + 2) T H elements; backward twice that.
    """
    rows, hidden = token_counts(tally.recipe).sharded, tally.recipe.model.hidden_size
    maps = num_streams**2 + 2 * num_streams
    tally.gemm(Part.NORMS, rows, num_streams * hidden, maps, number=Number.BF16)
    moved = (3 * num_streams + 2) * _BYTES * rows * hidden
    tally.move(Part.NORMS, forward_bytes=moved, backward_bytes=2 * moved)
    tally.launch(_STREAM_LAUNCHES, captured_by="attn")


def _add_compressor(tally: Tally, rows: int, hidden: int, channels: int) -> None:
    tally.gemm(_PART, rows, hidden, channels)
    moved = _COMPRESSOR_PASSES * _BYTES * rows * channels
    tally.move(_PART, forward_bytes=moved, backward_bytes=2 * moved)
    tally.launch(_COMPRESSOR_LAUNCHES, captured_by="attn")
