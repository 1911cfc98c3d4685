"""Floating-point operations of DeepSeek-V4's attention, which compresses far keys and chooses among them."""

from __future__ import annotations

from moe_bench.spec.mixer import CompressedAttention


def compressed_projection_flops(
    *, tokens: int, hidden: int, num_heads: int, head_dim: int, net: CompressedAttention, ratio: int
) -> int:
    """Forward FLOPs of all projections: F = 2 T w.

    w = H r_q + r_q n d + H d + n d r_o + G r_o H, a compressor's 2 c H d and, at ratio 4, an indexer's
    r_q n_i d_i + H n_i + 4 H d_i; c is 2 at ratio 4, whose windows of compression overlap, and 1 at 128
    (`compressed_attention_params`; Megatron-Bridge at 067f987df0, flop_utils.py, dsv4_hybrid).
    """
    weights = net.q_lora_rank * (hidden + num_heads * head_dim) + hidden * head_dim
    weights += net.output_lora_rank * (num_heads * head_dim + net.output_groups * hidden)
    if ratio:
        weights += 2 * (2 if ratio == 4 else 1) * hidden * head_dim
    if ratio == 4:
        index = net.num_index_heads * net.index_head_dim
        weights += net.q_lora_rank * index + hidden * (net.num_index_heads + 4 * net.index_head_dim)
    return 2 * tokens * weights


def compressed_core_flops(
    *, num_seqs: int, seq_len: int, num_heads: int, head_dim: int, net: CompressedAttention, ratio: int
) -> int:
    """Forward FLOPs of scores and values: F = 4 B S n d keys.

    A query sees W keys as they are, and of S / ratio compressed ones the half before it: all of them at 128,
    at 4 the best k, of which it averages k (1 - 2 k / S) (Megatron-Bridge, flop_utils.py, dsv4_hybrid).
    """
    twice_keys = 2 * net.window_tokens
    if ratio == 128:
        twice_keys += seq_len // ratio
    elif ratio == 4:
        chosen = min(net.index_top_k, seq_len // ratio)
        twice_keys += 2 * chosen - ratio * chosen**2 // seq_len
    return 2 * num_seqs * seq_len * num_heads * head_dim * twice_keys


def index_score_flops(*, num_seqs: int, seq_len: int, net: CompressedAttention, ratio: int) -> int:
    """Forward FLOPs of the indexer's scores of compressed keys, at ratio 4 alone: F = 2 B S n_i d_i S / 4.

    Megatron-Bridge counts them without the causal half (flop_utils.py, indexer_scoring_core).
    """
    if ratio != 4:
        return 0
    return 2 * num_seqs * seq_len * net.num_index_heads * net.index_head_dim * (seq_len // ratio)


def stream_mixing_flops(*, tokens: int, hidden: int, num_streams: int) -> int:
    """Forward FLOPs of the maps between n residual streams and a half layer: F = 2 T n H (n^2 + 2 n).

    Megatron-LM dev, transformer/hyper_connection.py (`mapping_proj`); the Sinkhorn iterations, on n x n
    numbers per token, and the sums over streams are left out.
    """
    return 2 * tokens * num_streams * hidden * (num_streams**2 + 2 * num_streams)
