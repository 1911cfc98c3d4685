"""Core attention, whole or windowed, forward and backward, as a call to be timed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.calibrate.inputs import DTYPES, FreshBackward, backward_call, normal
from moe_bench.harness.kernels.attention_kernels import block_mask, blockwise_attention, flash_attention
from moe_bench.results.calibration import AttentionCore, Dtype
from moe_bench.results.calibration_tasks import Implementation


def attention_call(
    what: AttentionCore, dtype: Dtype, implementation: Implementation, device: str
) -> Callable[[], object]:
    """Attention over tensors [sequence, batch, heads, channels], as Megatron-Core has them."""
    kind = DTYPES[dtype]
    is_backward = what.direction == "backward"

    def tensor(num_heads: int, channels: int) -> Tensor:
        made = normal(what.seq_len, what.num_seqs, num_heads, channels, dtype=kind, device=device)
        return made.requires_grad_(is_backward)

    query = tensor(what.num_heads, what.qk_head_dim)
    key = tensor(what.num_query_groups, what.qk_head_dim)
    value = tensor(what.num_query_groups, what.v_head_dim)
    attend = _attend(what, implementation, device)
    if not is_backward:
        return lambda: attend(query, key, value)
    inputs = [query, key, value]
    if implementation is Implementation.TE_ATTENTION:
        return FreshBackward(lambda: attend(*inputs), inputs)
    return backward_call(attend(*inputs), inputs)


def _attend(
    what: AttentionCore, implementation: Implementation, device: str
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    scale = what.qk_head_dim**-0.5
    # a window of 1 is the query's own token: none before it
    before = None if what.window_tokens is None else what.window_tokens - 1
    if implementation is Implementation.TE_ATTENTION:
        import transformer_engine.pytorch as te

        channels = (what.qk_head_dim, what.v_head_dim)
        attention: Callable[[Tensor, Tensor, Tensor], Tensor] = te.DotProductAttention(
            what.num_heads,
            channels[0] if channels[0] == channels[1] else channels,
            num_gqa_groups=what.num_query_groups,
            attention_dropout=0.0,
            attn_mask_type="causal",
            window_size=None if before is None else (before, 0),
            qkv_format="sbhd",
            softmax_scale=scale,
        )
        return attention
    if implementation is Implementation.SDPA_FLASH:
        return lambda query, key, value: flash_attention(query, key, value, scale=scale)
    if device == "cpu" and what.direction == "backward":
        raise MissingRequirementError("flex attention has no backward pass on a CPU")
    positions = torch.arange(what.seq_len, device=device)
    mask = block_mask(positions, positions, before)
    return lambda query, key, value: blockwise_attention(query, key, value, scale=scale, mask=mask, sink=None)
