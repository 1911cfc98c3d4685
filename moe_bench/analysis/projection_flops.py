"""Floating-point operations of products with weights: projections, MLPs, the joint of a prediction module."""

from __future__ import annotations

from moe_bench.spec.mixer import SparseIndexer


def gqa_projection_flops(
    *,
    tokens: int,
    hidden: int,
    num_heads: int,
    num_query_groups: int,
    head_dim: int,
    output_gate: bool = False,
) -> int:
    """Forward FLOPs of the query, key, value and output projections of grouped-query attention.

    F = 2 T H d (2 n + 2 g), and 2 T H d n more with an output gate: arXiv:2305.13245. Norms, biases and
    rotary embedding are left out.
    """
    return 2 * tokens * hidden * head_dim * ((2 + output_gate) * num_heads + 2 * num_query_groups)


def mla_projection_flops(
    *,
    tokens: int,
    hidden: int,
    num_heads: int,
    q_rank: int | None,
    kv_rank: int,
    nope_dim: int,
    rope_dim: int,
    v_dim: int,
) -> int:
    """Forward FLOPs of the down-, up- and output projections of multi-head latent attention.

    F = 2 T [H r_q + r_q n (d_n + d_r) + H (r_kv + d_r) + r_kv n (d_n + d_v) + n d_v H], and H n (d_n + d_r)
    for the queries where they are not compressed: arXiv:2405.04434, 2.1. Norms and biases are left out.
    """
    query = num_heads * (nope_dim + rope_dim)
    per_token = hidden * query if q_rank is None else q_rank * (hidden + query)
    per_token += hidden * (kv_rank + rope_dim) + kv_rank * num_heads * (nope_dim + v_dim)
    return 2 * tokens * (per_token + num_heads * v_dim * hidden)


def indexer_projection_flops(*, tokens: int, hidden: int, q_rank: int, indexer: SparseIndexer) -> int:
    """Forward FLOPs of an indexer's projections: F = 2 T (r_q n d + H d + H n), arXiv:2512.02556, 2.1."""
    heads, dim = indexer.num_heads, indexer.head_dim
    return 2 * tokens * (q_rank * heads * dim + hidden * (dim + heads))


def mlp_flops(*, tokens: int, hidden: int, ffn: int, num_matrices: int) -> int:
    """Forward FLOPs of an MLP or expert: F = 2 T H F per matrix: up, down, and a gate (arXiv:2002.05202).

    `num_matrices` is 3 with a gate and 2 without; the convention that forgot GPT-OSS's passes 2. Activation
    is left out.
    """
    return 2 * tokens * hidden * ffn * num_matrices


def mtp_projection_flops(*, tokens: int, hidden: int) -> int:
    """Forward FLOPs of an MTP module's projection of two concatenated vectors: F = 4 T H^2
    (arXiv:2412.19437).
    """
    return 4 * tokens * hidden**2
