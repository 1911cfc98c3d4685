"""Floating-point operations of multi-head latent attention whose queries see chosen keys only."""

from __future__ import annotations

from moe_bench.spec.mixer import SparseIndexer


def sparse_core_flops(
    *, num_seqs: int, seq_len: int, num_heads: int, kv_rank: int, rope_dim: int, num_chosen_keys: int
) -> int:
    """Forward FLOPs of scores and values in the latent space: F = 2 B n (2 r_kv + d_r) x pairs.

    Each query sees the keys before it and itself, at most k of them: pairs = S k - k (k - 1) / 2, which is
    S (S + 1) / 2 where k is not less than S. Megatron-Core keeps keys and values compressed here, so that all
    heads share them (absorbed_mla.py; Megatron-Bridge at 067f987df0, flop_utils.py, dsa).
    """
    chosen = min(num_chosen_keys, seq_len)
    twice_pairs = 2 * seq_len * chosen - chosen * (chosen - 1)
    return num_seqs * num_heads * (2 * kv_rank + rope_dim) * twice_pairs


def indexer_score_flops(*, num_seqs: int, seq_len: int, indexer: SparseIndexer) -> int:
    """Forward FLOPs of the scores among which keys are chosen: F = B n (d + 1) S (S + 1).

    Every key before a query, per head, and the heads' weighted sum (arXiv:2512.02556, equation 1).
    """
    return num_seqs * indexer.num_heads * (indexer.head_dim + 1) * seq_len * (seq_len + 1)
