"""Attention to chosen keys as operations: what chooses them, and scores and values of what was chosen."""

from __future__ import annotations

from moe_bench.analysis.activations import token_counts
from moe_bench.analysis.sparse_flops import indexer_score_flops, sparse_core_flops
from moe_bench.projection.work.operations import Part, Pass, SparseCore
from moe_bench.projection.work.tally import Modules, Tally
from moe_bench.spec.mixer import MultiLatentAttention, SparseIndexer

_CORE: Modules = frozenset({"core_attn"})
_SCORE_BYTES = 4
_SELECTION_PASSES = 4
"""Times that a query's FP32 scores are written or read until the best are known: written once, and read by
three rounds of a radix selection."""
_INDEXER_LAUNCHES = 35
"""Kernels of an indexer: its projections, norm, rotary embedding, scores, selection and their gradients;
counted in Megatron-Core's dsa.py to about a tenth."""
CORE_GRADIENT, SCORE_GRADIENT = 2.5, 2.0
"""FLOPs backward over forward, as `analysis/rank_flops.py` has them: five products for two, two for one."""


def add_sparse_latent_core(
    tally: Tally, attention: MultiLatentAttention, indexer: SparseIndexer, *, has_indexer: bool
) -> None:
    """Scores and values of the chosen keys in the latent space / (TP CP) (arXiv:2512.02556, 2.1), and in a
    layer that chooses for itself the indexer, which every tensor-parallel rank runs whole.
    """
    recipe = tally.recipe
    num_seqs, seq_len, parallel = recipe.micro_batch_size, recipe.seq_len, recipe.parallel
    flops = sparse_core_flops(
        num_seqs=num_seqs,
        seq_len=seq_len,
        num_heads=attention.num_heads,
        kv_rank=attention.kv_lora_rank,
        rope_dim=attention.qk_rope_head_dim,
        num_chosen_keys=indexer.num_chosen_keys,
    )
    num_keys = min(indexer.num_chosen_keys, seq_len)
    add_scores(tally, flops / (parallel.tensor * parallel.context), num_keys, gradient=CORE_GRADIENT)
    if not has_indexer:
        return
    rows, hidden = token_counts(recipe).sharded, recipe.model.hidden_size
    part, index = Part.ATTENTION_PROJECTIONS, indexer.num_heads * indexer.head_dim
    tally.gemm(part, rows, attention.q_lora_rank or hidden, index)
    tally.gemm(part, rows, hidden, indexer.head_dim + indexer.num_heads)
    scores = indexer_score_flops(num_seqs=num_seqs, seq_len=seq_len, indexer=indexer)
    add_scores(tally, scores / parallel.context, seq_len, gradient=SCORE_GRADIENT)
    add_selection(tally, num_keys=seq_len)


def add_scores(tally: Tally, flops: float, num_keys: float, *, gradient: float) -> None:
    """Work on pairs of a query and `num_keys` keys, and `gradient` times as much of it backward."""
    passes = [(in_pass, flops) for in_pass in tally.forward_passes(_CORE)]
    for in_pass, num_flops in (*passes, (Pass.DGRAD, gradient * flops)):
        tally.operations.append(SparseCore(in_pass=in_pass, num_flops=num_flops, num_keys=num_keys))


def add_selection(tally: Tally, *, num_keys: int) -> None:
    """The best of `num_keys` scores per query of this rank; a choice has no gradient."""
    rows = token_counts(tally.recipe).sharded
    moved = _SELECTION_PASSES * _SCORE_BYTES * rows * num_keys
    tally.move(Part.ATTENTION, forward_bytes=moved, backward_bytes=0)
    tally.launch(_INDEXER_LAUNCHES, captured_by="attn")
