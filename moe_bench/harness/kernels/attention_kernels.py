"""Causal attention in three ways: written out, by torch's flash kernel, by flex attention over a block mask.

Shapes, as Megatron-Core has them: query [s, b, heads, k_channels], key [t, b, groups, k_channels], value [t,
b, groups, v_channels], output [s, b, heads * v_channels]. A sink is one logit per head that joins the softmax
and attends to nothing (arXiv:2309.17453; GPT-OSS learns it).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from moe_bench.harness.kernels.compiled import compiled


def zigzag_positions(num_local: int, *, cp_size: int, cp_rank: int, device: torch.device) -> Tensor:
    """Positions in the whole sequence of the tokens that one context-parallel rank holds.

    The sequence is cut into 2 * cp_size chunks; rank r holds chunks r and 2 * cp_size - 1 - r, so that causal
    work is even (megatron/core/utils.py, get_batch_on_this_cp_rank).

    Args:
        num_local: tokens on this rank, an even number where cp_size is above 1.

    Returns:
        int64 [num_local].
    """
    if cp_size == 1:
        return torch.arange(num_local, device=device)
    chunk = num_local // 2
    within = torch.arange(chunk, device=device)
    return torch.cat([within + cp_rank * chunk, within + (2 * cp_size - 1 - cp_rank) * chunk])


def is_visible(query_positions: Tensor, key_positions: Tensor, window: int | None) -> Tensor:
    """Whether a query may see a key: not later, and at most `window` tokens earlier (None: any distance)."""
    visible = key_positions <= query_positions
    if window is None:
        return visible
    return visible & (key_positions >= query_positions - window)


def apply_sink(output: Tensor, log_sum_exp: Tensor, sink: Tensor) -> Tensor:
    """Turn attention without a sink into attention with one.

    With z = log(sum(exp(scores))), a sink adds exp(sink) to every softmax's denominator: out' = out * exp(z)
    / (exp(z) + exp(sink)) = out * sigmoid(z - sink). The gradient of the scores and of the sink follows from
    that of `output` and `log_sum_exp`.

    Args:
        output: [b, heads, s, v_channels].
        log_sum_exp: z, natural logarithm, [b, heads, s].
        sink: [heads].
    """
    share = torch.sigmoid(log_sum_exp - sink.to(log_sum_exp.dtype)[None, :, None])
    return (output * share[..., None]).to(output.dtype)


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    visible: Tensor,
    sink: Tensor | None,
) -> Tensor:
    """Attention written out: every score is computed and kept, in FP32 or better.

    Args:
        visible: bool [s, t].
        sink: [heads], or None.
    """
    heads_per_group = query.shape[2] // key.shape[2]
    key = key.repeat_interleave(heads_per_group, dim=2)
    value = value.repeat_interleave(heads_per_group, dim=2)
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = torch.einsum("sbhd,tbhd->bhst", query.to(wide), key.to(wide)) * scale
    scores = scores.masked_fill(~visible, float("-inf"))
    if sink is not None:
        column = sink.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    probabilities = scores.softmax(dim=-1)
    if sink is not None:
        probabilities = probabilities[..., :-1]
    return torch.einsum("bhst,tbhd->sbhd", probabilities.to(value.dtype), value).flatten(2)


def flash_attention(query: Tensor, key: Tensor, value: Tensor, *, scale: float) -> Tensor:
    """Causal attention over the whole sequence by torch's flash kernel, and by no other.

    The kernel wants keys and values of one width: MLA's narrower values get zero columns, which are cut off
    again. That costs (k_channels + k_channels) / (k_channels + v_channels) of the products: 1.2 for 192 and
    128.
    """
    v_channels = value.shape[-1]
    if v_channels < key.shape[-1]:
        value = functional.pad(value, (0, key.shape[-1] - v_channels))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        output = functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
    return output[..., :v_channels].permute(2, 0, 1, 3).flatten(2)


def block_mask(query_positions: Tensor, key_positions: Tensor, window: int | None) -> BlockMask:
    """Return the blocks of the score matrix that flex attention must visit, for tokens at these positions."""

    def visible(batch: Tensor, head: Tensor, query_index: Tensor, key_index: Tensor) -> Tensor:
        return is_visible(query_positions[query_index], key_positions[key_index], window)

    # Uncompiled, it writes out the whole [s, t] matrix.
    create = compiled(create_block_mask) if query_positions.is_cuda else create_block_mask
    num_queries, num_keys = len(query_positions), len(key_positions)
    return create(visible, None, None, num_queries, num_keys, device=query_positions.device)


def blockwise_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float, mask: BlockMask, sink: Tensor | None
) -> Tensor:
    """Attention by torch's flex kernel, which visits the blocks of `mask` only (backward on GPUs only)."""
    attend = compiled(_flex) if query.is_cuda else _flex
    output = attend(
        query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3), scale, mask, sink
    )
    return output.permute(2, 0, 1, 3).flatten(2)


def _flex(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: BlockMask, sink: Tensor | None
) -> Tensor:
    """Flex attention on [b, heads, s, channels]; with a sink, its gate is compiled into the same graph."""
    enable_gqa = query.shape[1] != key.shape[1]
    if sink is None:
        return flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=enable_gqa)
    output, aux = flex_attention(
        query,
        key,
        value,
        block_mask=mask,
        scale=scale,
        enable_gqa=enable_gqa,
        return_aux=AuxRequest(lse=True),
    )
    return apply_sink(output, aux.lse, sink)
