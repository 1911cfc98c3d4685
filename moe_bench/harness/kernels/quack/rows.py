"""Which token each row of the experts' products is, so that products can gather rows that nobody permuted.

Rows stand by expert. A product reads row r from `x[token_of_row[r]]`; a token's K rows are added up again by
`row_of_slot`. All of it is integers, made on the device without asking it for a number.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRows:
    """Rows of the local experts, in order of experts."""

    starts: Tensor
    """int32 [experts + 1]: where each expert's rows start; the last entry is the number of rows."""
    token_of_row: Tensor | None
    """int32 [rows]; None where row r is token r."""
    row_of_slot: Tensor
    """int32 [tokens, K]: the K rows of each token."""
    num_rows: int
    is_static: bool
    """Whether every micro batch has as many rows, so that kernels may be tuned for their number."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the backward pass needs of it, to be kept where autograd keeps tensors."""
        return self.starts, self.token_of_row, self.row_of_slot


def rows_in_order(tokens_per_expert: Tensor, *, num_rows: int, device: torch.device) -> ExpertRows:
    """Rows that a dispatcher has put in order of experts already.

    Args:
        tokens_per_expert: [experts], on the host or the device.
    """
    return ExpertRows(
        starts=_starts(tokens_per_expert.to(device=device, non_blocking=True)),
        token_of_row=None,
        row_of_slot=torch.arange(num_rows, dtype=torch.int32, device=device).unsqueeze(1),
        num_rows=num_rows,
        is_static=False,
    )


def rows_of_routing_map(
    routing_map: Tensor, probabilities: Tensor, *, top_k: int, is_fused: bool = False
) -> tuple[ExpertRows, Tensor]:
    """Rows of tokens that stay where they are, and the probability of each row, differentiably.

    Args:
        routing_map: bool [tokens, experts] with exactly `top_k` entries in each row of it: dropless routing.
        probabilities: [tokens, experts].
        is_fused: whether two Triton kernels number the rows in the place of torch's sort
            (`kernels.fusions.permute`).

    Returns:
        The rows, and their probabilities [tokens * top_k].
    """
    num_tokens = routing_map.shape[0]
    num_rows = num_tokens * top_k
    numbered = (_numbered if is_fused else _sorted)(routing_map, top_k=top_k)
    rows = ExpertRows(
        starts=_starts(routing_map.sum(dim=0)),
        token_of_row=(numbered.slot_of_row // top_k).int(),
        row_of_slot=numbered.row_of_slot.view(num_tokens, top_k),
        num_rows=num_rows,
        is_static=True,
    )
    chosen = probabilities.gather(1, numbered.experts.view(num_tokens, top_k))
    return rows, chosen.flatten().index_select(0, numbered.slot_of_row)


def rows_of_chunks(counts: Tensor, *, num_rows: int, device: torch.device) -> ExpertRows:
    """Rows that arrived by source and, from each source, by expert, as an all-to-all leaves them.

    Args:
        counts: [sources, experts], on the host or the device.
        num_rows: their sum, which the host knows.
    """
    counts = counts.to(device=device, non_blocking=True)
    by_expert = counts.t().flatten()
    arrived_at = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    wanted_at = (by_expert.cumsum(0) - by_expert).view_as(counts.t()).t()
    shift = arrived_at - wanted_at
    places = torch.arange(num_rows, device=device)
    token_of_row = places + shift.t().flatten().repeat_interleave(by_expert, output_size=num_rows)
    row_of_token = places - shift.flatten().repeat_interleave(counts.flatten(), output_size=num_rows)
    return ExpertRows(
        starts=_starts(counts.sum(dim=0)),
        token_of_row=token_of_row.int(),
        row_of_slot=row_of_token.int().unsqueeze(1),
        num_rows=num_rows,
        is_static=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choices:
    """The experts that tokens chose, a slot for each choice, and the rows in which they stand."""

    experts: Tensor
    """int64 [slots]."""
    row_of_slot: Tensor
    """int32 [slots]."""
    slot_of_row: Tensor
    """int64 [slots]."""


def _sorted(routing_map: Tensor, *, top_k: int) -> _Choices:
    num_rows = routing_map.shape[0] * top_k
    experts = torch.nonzero_static(routing_map, size=num_rows)[:, 1].contiguous()
    slot_of_row = experts.sort(stable=True).indices
    slots = torch.arange(num_rows, dtype=torch.int32, device=routing_map.device)
    row_of_slot = torch.empty_like(slots).scatter_(0, slot_of_row, slots)
    return _Choices(experts=experts, row_of_slot=row_of_slot, slot_of_row=slot_of_row)


def _numbered(routing_map: Tensor, *, top_k: int) -> _Choices:
    from moe_bench.harness.kernels.fused.row_map import row_map  # imports Triton

    row_of_slot, experts = row_map(routing_map, num_slots=top_k).slots.unbind(1)
    row_of_slot = row_of_slot.flatten()
    slots = torch.arange(row_of_slot.shape[0], device=routing_map.device)
    slot_of_row = torch.empty_like(slots).scatter_(0, row_of_slot.long(), slots)
    return _Choices(experts=experts.flatten().long(), row_of_slot=row_of_slot, slot_of_row=slot_of_row)


def _starts(counts: Tensor) -> Tensor:
    ends = counts.cumsum(dim=0, dtype=torch.int32)
    return torch.nn.functional.pad(ends, (1, 0))
