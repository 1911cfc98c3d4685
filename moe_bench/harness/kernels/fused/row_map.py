"""Which rows of the permuted tokens each token's copies go to: a counting sort by expert, in two passes.

The routing map [tokens, experts] is cut into blocks of tokens. The first kernel counts each expert's tokens
per block, a prefix sum over [experts, blocks] says where each block's rows of each expert begin, and the
second kernel numbers the tokens inside its block. Nothing is compared, and nothing is read back by the host.

Bytes: the map is read twice, t E each, and 8 t S are written (S slots per token).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_ENTRIES = 2048
"""Entries of the routing map that one program numbers: 16 per thread. ptxas needs 80 to 124 registers for
them on sm_90 and spills at 8,192; 4,096 tokens of 256 experts are 512 programs for 132 SMs."""
MAX_BLOCK_TOKENS = 256
NUM_WARPS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class RowMap:
    """Where the copies of each token stand; a token has as many slots as it may have experts."""

    slots: Tensor
    """[tokens, 2, S] int32: the rows of a token's copies in the order of their experts, then those experts;
    -1 in the slots that are left over."""

    @property
    def num_slots(self) -> int:
        """S, the most experts that a token can have."""
        return int(self.slots.shape[2])


def row_map(routing_map: Tensor, *, num_slots: int) -> RowMap:
    """Number the set entries of `routing_map` expert by expert, tokens in order.

    Args:
        routing_map: bool [tokens, experts].
        num_slots: the most entries that a row of it can have.
    """
    num_tokens, num_experts = routing_map.shape
    slots = torch.empty(num_tokens, 2, num_slots, dtype=torch.int32, device=routing_map.device)
    expert_block = triton.next_power_of_2(num_experts)
    token_block = max(1, min(BLOCK_ENTRIES // expert_block, MAX_BLOCK_TOKENS))
    num_blocks = triton.cdiv(num_tokens, token_block)
    counts = torch.empty(num_experts, num_blocks, dtype=torch.int32, device=routing_map.device)
    if num_tokens == 0:
        return RowMap(slots=slots)
    entries = routing_map.contiguous().view(torch.uint8)
    sizes = {"block_t": token_block, "block_e": expert_block}
    sizes |= {"num_warps": NUM_WARPS, "enable_fp_fusion": True}
    _count_kernel[(num_blocks,)](entries, counts, num_tokens, num_experts, num_blocks, **sizes)
    ends = counts.view(-1).cumsum(dim=0, dtype=torch.int32)
    _number_kernel[(num_blocks,)](
        entries,
        counts,
        ends,
        slots,
        num_tokens,
        num_experts,
        num_blocks,
        num_slots,
        block_s=triton.next_power_of_2(num_slots),
        **sizes,
    )
    return RowMap(slots=slots)


@triton.jit
def _entries(
    map_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    block_t: tl.constexpr,
    block_e: tl.constexpr,
) -> Any:
    tokens = tl.program_id(0) * block_t + tl.arange(0, block_t)
    experts = tl.arange(0, block_e)
    is_inside = (tokens < num_tokens)[:, None] & (experts < num_experts)[None, :]
    places = tokens.to(tl.int64)[:, None] * num_experts + experts[None, :]
    return tokens, experts, tl.load(map_ptr + places, mask=is_inside, other=0).to(tl.int32)


@triton.jit
def _count_kernel(
    map_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    num_blocks: tl.tensor,
    block_t: tl.constexpr,
    block_e: tl.constexpr,
) -> None:
    _, experts, entries = _entries(map_ptr, num_tokens, num_experts, block_t, block_e)
    places = experts * num_blocks + tl.program_id(0)
    tl.store(counts_ptr + places, tl.sum(entries, axis=0), mask=experts < num_experts)


@triton.jit
def _number_kernel(
    map_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    slots_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    num_blocks: tl.tensor,
    num_slots: tl.tensor,
    block_t: tl.constexpr,
    block_e: tl.constexpr,
    block_s: tl.constexpr,
) -> None:
    tokens, experts, entries = _entries(map_ptr, num_tokens, num_experts, block_t, block_e)
    places = experts * num_blocks + tl.program_id(0)
    is_expert = experts < num_experts
    ends = tl.load(ends_ptr + places, mask=is_expert, other=0)
    starts = ends - tl.load(counts_ptr + places, mask=is_expert, other=0)
    rows = starts[None, :] + tl.cumsum(entries, axis=0) - entries
    slots = tl.cumsum(entries, axis=1) - entries
    out = slots_ptr + tokens.to(tl.int64)[:, None] * (2 * num_slots)
    # A map with more entries than slots would write over the next token's: it loses them instead.
    is_set = (entries != 0) & (slots < num_slots)
    tl.store(out + slots, rows, mask=is_set)
    tl.store(out + num_slots + slots, experts[None, :] + tl.zeros_like(slots), mask=is_set)
    every_slot = tl.arange(0, block_s)[None, :]
    num_set = tl.sum(entries, axis=1)[:, None]
    is_left = (every_slot >= num_set) & (every_slot < num_slots) & (tokens < num_tokens)[:, None]
    nothing = tl.full([block_t, block_s], -1, tl.int32)
    tl.store(out + every_slot, nothing, mask=is_left)
    tl.store(out + num_slots + every_slot, nothing, mask=is_left)
