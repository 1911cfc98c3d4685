"""The attention half of a layer as operations: projections, rotary embedding, norms, and the core."""

from __future__ import annotations

from moe_bench.analysis.activations import token_counts
from moe_bench.analysis.flops import core_attention_flops
from moe_bench.projection.work.operations import AttentionCore, Gemm, Part, Pass
from moe_bench.projection.work.sparse_core import add_sparse_latent_core
from moe_bench.projection.work.tally import Modules, Tally
from moe_bench.spec.mixer import GroupedQueryAttention, MultiLatentAttention
from moe_bench.spec.model import LayerStructure

_UP: Modules = frozenset({"mla_up_proj"})
_CORE: Modules = frozenset({"core_attn"})
_NORM: Modules = frozenset({"layernorm"})
_BYTES = 2
"""Of a BF16 element."""

_UNFUSED_ROPE = 3.0
"""Times as many bytes as the fused kernel moves: cosine and sine products and their sum, each read and
written (megatron/core/models/common/embeddings/rope_utils.py, _apply_rotary_pos_emb_bshd)."""

_SOFTMAX_FORWARD, _SOFTMAX_BACKWARD = 2, 3
"""Times that softmax reads or writes the scores in BF16: in and out; probabilities, their gradient, out."""

_GQA_LAUNCHES = 70
_MLA_LAUNCHES = 95
"""Kernels of the attention half, forward and backward: norm, projections with their three products, rotary
embedding, core, residual, and what autograd adds. Counted in Megatron-Core 0.19.2 with Transformer Engine to
about a tenth; their cost per launch is a constant of the projection."""


def add_attention(tally: Tally, structure: LayerStructure) -> None:
    """Input norm, attention and residual of one layer."""
    model = tally.recipe.model
    hidden_bytes = _BYTES * token_counts(tally.recipe).sharded * model.hidden_size
    add_norm_and_residual(tally, hidden_bytes)
    if model.attention.kind == "mla":
        _add_latent(tally, model.attention, structure)
        tally.launch(_MLA_LAUNCHES, captured_by="attn")
    else:
        _add_grouped_query(tally, model.attention, structure)
        tally.launch(_GQA_LAUNCHES, captured_by="attn")


def add_norm_and_residual(tally: Tally, hidden_bytes: float, *, is_last: bool = False) -> None:
    """RMSNorm of a half layer's input (read, write; backward also the input) and the residual's sum, which no
    gradient asks for where the half layer is the last one.
    """
    tally.move(Part.NORMS, forward_bytes=2 * hidden_bytes, backward_bytes=3 * hidden_bytes, repeated_by=_NORM)
    tally.move(Part.NORMS, forward_bytes=3 * hidden_bytes, backward_bytes=2 * hidden_bytes, is_last=is_last)


def _add_grouped_query(tally: Tally, attention: GroupedQueryAttention, structure: LayerStructure) -> None:
    recipe = tally.recipe
    tensor, hidden, rows = recipe.parallel.tensor, recipe.model.hidden_size, token_counts(recipe).gathered
    heads, groups, dim = attention.num_heads, attention.num_query_groups, attention.head_dim
    columns = ((1 + attention.output_gate) * heads + 2 * groups) * dim / tensor
    tally.gemm(Part.ATTENTION_PROJECTIONS, rows, hidden, columns)
    rotated = _BYTES * rows * (heads + groups) * dim / tensor
    if not recipe.model.learned_positions:
        rope = 2 * rotated * (1 if recipe.kernels.fusions.rope else _UNFUSED_ROPE)
        tally.move(Part.ATTENTION_PROJECTIONS, forward_bytes=rope, backward_bytes=rope)
    if attention.qk_norm != "none":
        tally.move(Part.ATTENTION_PROJECTIONS, forward_bytes=2 * rotated, backward_bytes=3 * rotated)
    # queries, keys and values leave one product interleaved by group and are written apart
    split = 2 * _BYTES * rows * columns
    tally.move(Part.ATTENTION_PROJECTIONS, forward_bytes=split, backward_bytes=split)
    _add_core(tally, structure, num_heads=heads, qk_dim=dim, v_dim=dim)
    if attention.output_gate:
        gated = _BYTES * rows * heads * dim / tensor
        tally.move(Part.ATTENTION_PROJECTIONS, forward_bytes=3 * gated, backward_bytes=5 * gated)
    tally.gemm(Part.ATTENTION_PROJECTIONS, rows, heads * dim / tensor, hidden)


def _add_latent(tally: Tally, attention: MultiLatentAttention, structure: LayerStructure) -> None:
    """Multi-head latent attention (arXiv:2405.04434): down-projections whole on every rank. With sparse
    attention queries and output pass the latent space, where all heads share keys and values.
    """
    recipe = tally.recipe
    counts, tensor, hidden = token_counts(recipe), recipe.parallel.tensor, recipe.model.hidden_size
    heads, rows = attention.num_heads / tensor, counts.gathered
    nope, rotary, value = attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim
    part = Part.ATTENTION_PROJECTIONS
    if attention.q_lora_rank is None:
        tally.gemm(part, rows, hidden, heads * (nope + rotary), repeated_by=_UP)
    else:
        tally.gemm(part, counts.sharded, hidden, attention.q_lora_rank)
        tally.gemm(part, rows, attention.q_lora_rank, heads * (nope + rotary), repeated_by=_UP)
    tally.gemm(part, counts.sharded, hidden, attention.kv_lora_rank + rotary)
    tally.gemm(part, rows, attention.kv_lora_rank, heads * (nope + value), repeated_by=_UP)
    latents = _BYTES * counts.sharded * ((attention.q_lora_rank or 0) + attention.kv_lora_rank)
    tally.move(part, forward_bytes=2 * latents, backward_bytes=3 * latents, repeated_by=_UP)
    # queries rotated in place; keys written from their two parts, values beside them
    queries = 2 * (nope + rotary)
    keys_values = (nope + value) + (nope + rotary) + value
    if attention.sparse is not None:
        queries, keys_values = 2 * (attention.kv_lora_rank + rotary), 0
    fused = 1 if recipe.kernels.fusions.rope else _UNFUSED_ROPE
    built = _BYTES * rows * heads * (queries * fused + keys_values)
    tally.move(part, forward_bytes=built, backward_bytes=built, repeated_by=_UP)
    if attention.sparse is not None:
        add_sparse_latent_core(tally, attention, attention.sparse, has_indexer=structure.has_indexer)
    else:
        _add_core(tally, None, num_heads=attention.num_heads, qk_dim=nope + rotary, v_dim=value)
    tally.gemm(part, rows, heads * value, hidden)


def _add_core(
    tally: Tally, structure: LayerStructure | None, *, num_heads: int, qk_dim: int, v_dim: int
) -> None:
    """Forward two products per pair of tokens, backward five (arXiv:2307.08691, 3.1.2)."""
    recipe = tally.recipe
    parallel = recipe.parallel
    window_tokens = None if structure is None else structure.window_tokens
    chunk_tokens = None if structure is None else structure.chunk_tokens

    def flops(qk_channels: int, v_channels: int) -> float:
        whole = core_attention_flops(
            num_seqs=recipe.micro_batch_size,
            seq_len=recipe.seq_len,
            num_heads=num_heads,
            qk_dim=qk_channels,
            v_dim=v_channels,
            window_tokens=window_tokens,
            chunk_tokens=chunk_tokens,
            causal_half=True,
        )
        return whole / (parallel.tensor * parallel.context)

    if not tally.fuses_attention:
        _add_unfused_core(tally, num_heads=num_heads / parallel.tensor, qk_dim=qk_dim, v_dim=v_dim)
        return
    seq_len = min(recipe.seq_len, window_tokens or recipe.seq_len, chunk_tokens or recipe.seq_len)
    backward = (Pass.DGRAD, flops(3 * qk_dim, 2 * v_dim))
    forward = [(in_pass, flops(qk_dim, v_dim)) for in_pass in tally.forward_passes(_CORE)]
    for in_pass, num_flops in (*forward, backward):
        tally.operations.append(
            AttentionCore(
                in_pass=in_pass,
                num_flops=num_flops,
                seq_len=seq_len,
                context=1 if parallel.context_comm == "a2a" else parallel.context,
                qk_head_dim=qk_dim,
                v_head_dim=v_dim,
            )
        )


def _add_unfused_core(tally: Tally, *, num_heads: float, qk_dim: int, v_dim: int) -> None:
    """Scores, softmax and values as kernels of their own, over the whole score matrix of every head; backward
    the four products of its gradients (Transformer Engine's UnfusedDotProductAttention).
    """
    recipe = tally.recipe
    keys = recipe.seq_len // recipe.parallel.context
    rows = recipe.micro_batch_size * num_heads * keys
    forward = [(qk_dim, recipe.seq_len), (recipe.seq_len, v_dim)]
    backward = [
        (v_dim, recipe.seq_len),
        (recipe.seq_len, qk_dim),
        (recipe.seq_len, qk_dim),
        (recipe.seq_len, v_dim),
    ]
    passes = [(in_pass, forward) for in_pass in tally.forward_passes(_CORE)] + [(Pass.DGRAD, backward)]
    for in_pass, products in passes:
        for inner, columns in products:
            tally.operations.append(
                Gemm(
                    part=Part.ATTENTION, in_pass=in_pass, num_rows=rows, num_inner=inner, num_columns=columns
                )
            )
    scores = _BYTES * rows * recipe.seq_len
    tally.move(
        Part.ATTENTION,
        forward_bytes=_SOFTMAX_FORWARD * scores,
        backward_bytes=_SOFTMAX_BACKWARD * scores,
        repeated_by=_CORE,
    )
