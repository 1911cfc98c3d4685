"""What the Triton kernels compute, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moe_bench.harness.kernels.fused.routing import SUM_EPSILON, Choice


def route_reference(logits: Tensor, choice: Choice, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`route` in plain torch, differentiable, in FP32 or better."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = {
        "softmax": lambda: wide.softmax(dim=-1),
        "sigmoid": wide.sigmoid,
        "sqrtsoftplus": lambda: functional.softplus(wide).sqrt(),
    }[choice.score]()
    picked_by = wide if choice.score == "softmax" and not choice.is_before else scores
    if bias is not None and choice.score != "softmax":
        picked_by = picked_by + bias
    picked_by = picked_by.detach()
    if choice.num_groups > 1:
        grouped = picked_by.unflatten(-1, (choice.num_groups, -1))
        best = grouped.topk(choice.per_group, dim=-1).values.sum(dim=-1)
        allowed = torch.zeros_like(best, dtype=torch.bool)
        allowed.scatter_(-1, best.topk(choice.groups_per_token, dim=-1).indices, True)
        picked_by = grouped.masked_fill(~allowed.unsqueeze(-1), -torch.inf).flatten(-2)
    chosen = torch.zeros_like(picked_by, dtype=torch.bool)
    chosen.scatter_(-1, picked_by.topk(choice.top_k, dim=-1).indices, True)
    pool = torch.ones_like(chosen) if choice.pools_all else chosen
    if choice.score == "softmax":
        weights = wide.masked_fill(~pool, -torch.inf).softmax(dim=-1)
    else:
        total = (scores * pool).sum(dim=-1, keepdim=True) + SUM_EPSILON if choice.is_normalised else 1.0
        weights = scores * pool / total
    if choice.is_for_losses:
        return weights, chosen
    return (choice.scale * weights * chosen).to(logits.dtype), chosen


def row_map_reference(routing_map: Tensor, *, num_slots: int) -> Tensor:
    """`row_map(...).slots` in plain torch."""
    num_tokens, num_experts = routing_map.shape
    by_expert = routing_map.t().reshape(-1).cumsum(0).view(num_experts, num_tokens).t() - 1
    slots = torch.full((num_tokens, 2, num_slots), -1, dtype=torch.int32, device=routing_map.device)
    for token in range(num_tokens):
        experts = routing_map[token].nonzero().flatten()
        slots[token, 0, : len(experts)] = by_expert[token, experts].int()
        slots[token, 1, : len(experts)] = experts.int()
    return slots


def permute_reference(
    tokens: Tensor, probabilities: Tensor, slots: Tensor, *, num_rows: int
) -> tuple[Tensor, Tensor]:
    """`permute` in plain torch."""
    token, slot = (slots[:, 0] >= 0).nonzero(as_tuple=True)
    row, expert = slots[token, 0, slot].long(), slots[token, 1, slot].long()
    order = torch.empty(num_rows, dtype=torch.long, device=slots.device).index_copy_(0, row, token)
    choice = torch.empty(num_rows, dtype=torch.long, device=slots.device).index_copy_(0, row, expert)
    return tokens[order], probabilities[order, choice]


def unpermute_reference(rows: Tensor, slots: Tensor) -> Tensor:
    """`unpermute` in plain torch."""
    is_used = slots[:, 0] >= 0
    copies = rows[slots[:, 0].clamp(min=0).long()].to(torch.promote_types(rows.dtype, torch.float32))
    return (copies * is_used.unsqueeze(-1)).sum(dim=1).to(rows.dtype)


def source_rows_reference(counts: Tensor) -> Tensor:
    """`source_rows` in plain torch."""
    sizes = counts.flatten().tolist()
    chunks = torch.arange(sum(sizes), dtype=torch.int32, device=counts.device).split(sizes)
    num_senders, num_experts = counts.shape
    order = [sender * num_experts + expert for expert in range(num_experts) for sender in range(num_senders)]
    return torch.cat([chunks[index] for index in order])


def accumulate_weight_gradient_reference(main_grad: Tensor, grad: Tensor, x: Tensor, offsets: Tensor) -> None:
    """`accumulate_weight_gradient` in plain torch."""
    start = 0
    for expert, end in enumerate(offsets.tolist()):
        product = grad[start:end].to(main_grad.dtype).t() @ x[start:end].to(main_grad.dtype)
        main_grad[expert].add_(product)
        start = end
