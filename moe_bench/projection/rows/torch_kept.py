"""What torchtitan's operator-wise activation checkpointing keeps of a layer.

pytorch/torchtitan 5b5d468 distributed/activation_checkpoint.py, _apply_op_sac, and
models/deepseek_v3/infra/parallelize.py, _op_sac_save_list.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.analysis.activations import activation_element_bytes, token_counts
from moe_bench.spec.mixer import GroupedQueryAttention
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.recipe import Recipe

_STATISTICS_BYTES = 4
"""Logarithm of the softmax's sum, per head and token."""


def operator_checkpoint_bytes(recipe: Recipe, *, is_moe: bool, is_compiled: bool) -> int:
    """Of one layer and micro batch: its input, attention's output, and that of the first, third, fifth ...
    product, in the order in which the layer runs them; with experts the rows that arrive and return, too.

    The router's product is recomputed and not counted, and so are the experts' grouped products. Row-wise
    products are counted as they leave, a t H each. A compiled layer does not keep the last one, which is but
    added to its output: no gradient reads it.
    """
    model, tensor = recipe.model, recipe.parallel.tensor
    tokens = token_counts(recipe)
    element = activation_element_bytes(recipe)
    heads = model.attention.num_heads // tensor
    kept = element * tokens.sharded * model.hidden_size
    kept += tokens.gathered * (element * heads * value_dim(model) + _STATISTICS_BYTES * heads)
    products = tuple(_products(model, is_moe=is_moe))
    for index, (width, is_split) in enumerate(products[:-1] if is_compiled else products):
        if index % 2 == 0:
            kept += element * (tokens.gathered * width // tensor if is_split else tokens.sharded * width)
    if is_moe and model.moe is not None and recipe.parallel.expert > 1:
        kept += 2 * element * tokens.sharded * model.moe.top_k * model.hidden_size
    return kept


def value_dim(model: ModelSpec) -> int:
    """Elements of one head's values."""
    attention = model.attention
    return attention.head_dim if isinstance(attention, GroupedQueryAttention) else attention.v_head_dim


def _products(model: ModelSpec, *, is_moe: bool) -> Iterator[tuple[int, bool]]:
    """Width of every product's output, and whether tensor parallelism splits it, in order."""
    attention, hidden = model.attention, model.hidden_size
    heads = attention.num_heads
    if isinstance(attention, GroupedQueryAttention):
        yield heads * attention.head_dim, True
        yield attention.num_query_groups * attention.head_dim, True
        yield attention.num_query_groups * attention.head_dim, True
    else:
        if attention.q_lora_rank is not None:
            yield attention.q_lora_rank, False
        yield heads * (attention.qk_nope_head_dim + attention.qk_rope_head_dim), True
        yield attention.kv_lora_rank + attention.qk_rope_head_dim, False
        yield heads * (attention.qk_nope_head_dim + attention.v_head_dim), True
    yield hidden, False
    ffn = model.dense_ffn_hidden_size
    if is_moe and model.moe is not None:
        ffn = model.moe.shared_expert_ffn_hidden_size
    if ffn:
        for _ in range(1 + model.activation.is_gated):
            yield ffn, True
        yield hidden, False
