"""Heads, key-value groups and the sequence divide over tensor and context ranks."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, nearest_divisor, nearest_multiples, rule
from moe_bench.spec.recipe import Recipe

_CONFIG = "megatron/core/transformer/transformer_config.py"
_TE_CONTEXT = "Transformer Engine 2.20, dot_product_attention/context_parallel.py"


@rule("every tensor rank holds whole heads", f"{_CONFIG}:1324")
def heads(recipe: Recipe) -> Iterator[Found]:
    tensor, num_heads = recipe.parallel.tensor, recipe.model.attention.num_heads
    if num_heads % tensor:
        yield "parallel.tensor", f"TP{tensor}, {num_heads} heads", f"use {nearest_divisor(num_heads, tensor)}"


@rule("groups of key-value heads and tensor ranks must divide one another", f"{_CONFIG}:1342")
def query_groups(recipe: Recipe) -> Iterator[Found]:
    tensor, attention = recipe.parallel.tensor, recipe.model.attention
    if attention.kind != "gqa" or attention.num_heads % tensor:
        return
    num_groups = attention.num_query_groups
    if num_groups % tensor and tensor % num_groups:
        yield (
            "parallel.tensor",
            f"TP{tensor}, {num_groups} query groups",
            f"use {nearest_divisor(num_groups, tensor)}",
        )


@rule("grouped heads are equal groups", "arXiv:2305.13245, section 2.2")
def heads_per_group(recipe: Recipe) -> Iterator[Found]:
    attention = recipe.model.attention
    if attention.kind == "gqa" and attention.num_heads % attention.num_query_groups:
        yield (
            "model.attention.num_query_groups",
            f"{attention.num_query_groups} query groups, {attention.num_heads} heads",
            f"use {nearest_divisor(attention.num_heads, attention.num_query_groups)}",
        )


@rule(
    "Megatron-Core's MLA rotates neighbouring pairs and knows no other way",
    f"{_CONFIG}:2194",
    "megatron/core/models/common/embeddings/rope_utils.py:289",
)
def mla_rotates_pairs(recipe: Recipe) -> Iterator[Found]:
    if recipe.model.attention.kind == "mla" and not recipe.model.rope.interleaved:
        yield "model.rope.interleaved", "false with MLA", "write true"


@rule("the fused rotary embedding of MLA is written for YaRN", f"{_CONFIG}:2967")
def mla_rope_fusion(recipe: Recipe) -> Iterator[Found]:
    model = recipe.model
    if recipe.kernels.fusions.rope and model.attention.kind == "mla" and model.rope.scaling is None:
        yield "kernels.fusions.rope", "true with MLA and plain RoPE", "write false"


@rule(
    "each context rank takes two chunks of the sequence, for balance under the causal mask",
    "megatron/training/arguments.py:1296",
)
def context_chunks(recipe: Recipe) -> Iterator[Found]:
    context = recipe.parallel.context
    if context > 1 and recipe.seq_len % (2 * context):
        yield "seq_len", f"{recipe.seq_len} tokens, CP{context}", f"use {_around(recipe)}"


@rule(
    "with sequence parallelism each tensor rank holds an equal part of the sequence",
    "megatron/core/tensor_parallel/mappings.py:72",
)
def sequence_parts(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    part = recipe.seq_len // parallel.context
    if parallel.sequence_parallel and part % parallel.tensor and recipe.seq_len % parallel.context == 0:
        yield (
            "seq_len",
            f"{recipe.seq_len} tokens over CP{parallel.context} and TP{parallel.tensor}",
            f"use {_around(recipe)}",
        )


@rule(
    "there is no sequence parallelism without tensor parallelism",
    "megatron/core/model_parallel_config.py:504",
    "megatron/training/arguments.py:1402",
)
def sequence_parallel_needs_tensor(recipe: Recipe) -> Iterator[Found]:
    if recipe.parallel.sequence_parallel and recipe.parallel.tensor == 1:
        yield "parallel.sequence_parallel", "true with TP1", "write false"


@rule(
    "expert layers train under tensor parallelism only with sequence parallelism",
    "megatron/core/transformer/moe/moe_layer.py:630",
)
def experts_need_sequence_parallel(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    if recipe.model.moe is not None and parallel.tensor > 1 and not parallel.sequence_parallel:
        yield "parallel.sequence_parallel", f"false with experts and TP{parallel.tensor}", "write true"


@rule("the torch-native attention gathers keys and values", "moe_bench/harness/kernels/attention.py")
def torch_native_context(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    if not recipe.kernels.is_torch_native or parallel.context == 1:
        return
    if parallel.context_comm != "allgather":
        yield (
            "parallel.context_comm",
            f"{parallel.context_comm} with {recipe.kernels.family}",
            "write allgather",
        )


@rule(
    "a2a exchanges sequence for heads: every context rank needs its share of both",
    f"{_TE_CONTEXT}, AttnFuncWithCPAndQKVOA2A",
)
def context_heads(recipe: Recipe) -> Iterator[Found]:
    parallel, attention = recipe.parallel, recipe.model.attention
    if parallel.context == 1 or parallel.context_comm != "a2a":
        return
    key_heads = attention.num_query_groups if attention.kind == "gqa" else attention.num_heads
    for what, number in (("heads", attention.num_heads), ("key-value heads", key_heads)):
        per_rank = max(1, number // parallel.tensor)
        if per_rank % parallel.context:
            yield (
                "parallel.context_comm",
                f"a2a over CP{parallel.context}, {per_rank} {what} per tensor rank",
                f"use CP{nearest_divisor(per_rank, parallel.context)}, p2p or allgather",
            )
            return


@rule(
    "sliding windows reach across ranks only by a2a or allgather", f"{_TE_CONTEXT}, attn_forward_func_with_cp"
)
def context_windows(recipe: Recipe) -> Iterator[Found]:
    parallel, attention = recipe.parallel, recipe.model.attention
    has_window = attention.kind == "gqa" and attention.sliding_window is not None
    if parallel.context > 1 and has_window and parallel.context_comm == "p2p":
        yield "parallel.context_comm", f"p2p over CP{parallel.context} with sliding windows", "write a2a"


@rule(
    "attention sinks join the softmax of whole rows, which only a2a has",
    f"{_TE_CONTEXT}, attn_forward_func_with_cp",
)
def context_sinks(recipe: Recipe) -> Iterator[Found]:
    parallel, attention = recipe.parallel, recipe.model.attention
    if parallel.context == 1 or recipe.kernels.family != "transformer_engine":
        return
    if attention.kind == "gqa" and attention.sinks and parallel.context_comm == "allgather":
        yield "parallel.context_comm", f"allgather over CP{parallel.context} with sinks", "write a2a"


RULES = (
    heads, query_groups, heads_per_group, mla_rotates_pairs, mla_rope_fusion, context_chunks, sequence_parts,
    sequence_parallel_needs_tensor, experts_need_sequence_parallel, torch_native_context, context_heads,
    context_windows, context_sinks,
)  # fmt: skip


def _around(recipe: Recipe) -> str:
    """The sequence lengths around the recipe's that context and tensor ranks share evenly."""
    parallel = recipe.parallel
    unit = 2 * parallel.context if parallel.context > 1 else 1
    return nearest_multiples(recipe.seq_len, unit * (parallel.tensor if parallel.sequence_parallel else 1))
