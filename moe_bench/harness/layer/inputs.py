"""Inputs of a MoE layer that its own router sends where a case wants them, whichever engine runs it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_bench.harness.layer.weights import LayerWeights
from moe_bench.spec.layer_case import LayerCase, LayerRouting

CHOSEN_LOGITS, OTHER_LOGITS = (1.0, 2.0), (-2.0, -1.0)
"""Ranges of the router's logits. The gap is far wider than BF16 rounds, so every engine chooses alike; within
the ranges they differ, so that probabilities do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """What a layer is given, and where its tokens go."""

    x: Tensor
    """[tokens, hidden] of the case's type."""
    gradient: Tensor
    """[tokens, hidden], of the output."""
    choices: Tensor
    """[tokens, top_k]: the experts of each token, of all ranks, in no order."""
    tokens_per_expert: tuple[int, ...]
    """Tokens of this rank that each expert of all ranks gets."""


def routed_inputs(case: LayerCase, weights: LayerWeights) -> LayerInputs:
    """Normal inputs, moved as little as possible to where the router's logits choose as the case says.

    x = z + (l - b - z W^T) (W W^T)^-1 W has logits x W^T + b = l, for z ~ N(0, 1) and wanted logits l; it is
    the nearest such x to z. Needs experts to be no more than the hidden size, as they are everywhere.
    """
    router = weights.router.double()
    device = router.device
    generator = torch.Generator(device=device).manual_seed(case.seed + 1)
    choices = expert_choices(case, generator=generator, device=device)
    logits = _logits(choices, num_experts=case.moe.num_experts, generator=generator)
    if weights.router_bias is not None:
        logits -= weights.router_bias
    x = torch.randn(case.num_tokens, case.hidden_size, generator=generator, device=device)
    inverse = torch.linalg.inv(router @ router.t())
    missing = (logits.double() - x.double() @ router.t()) @ inverse
    x += (missing @ router).to(x.dtype)
    gradient = torch.randn(x.shape, generator=generator, device=device)
    kind = weights.router.dtype
    counts = torch.bincount(choices.flatten(), minlength=case.moe.num_experts)
    return LayerInputs(
        x=x.to(kind),
        gradient=gradient.to(kind),
        choices=choices,
        tokens_per_expert=tuple(counts.tolist()),
    )


def expert_choices(case: LayerCase, *, generator: torch.Generator, device: torch.device) -> Tensor:
    """[tokens, top_k] experts, drawn without replacement by the shares of the routing, or in turn.

    With group-limited routing the groups are drawn first, each by the largest of its experts' draws, as the
    router will choose them.
    """
    moe, num_tokens = case.moe, case.num_tokens
    if case.routing.kind == "balanced":
        first = torch.arange(num_tokens, device=device)[:, None] * moe.top_k
        return (first + torch.arange(moe.top_k, device=device)) % moe.num_experts
    shares = torch.tensor(expert_shares(case), dtype=torch.float64, device=device)
    uniform = torch.rand(num_tokens, moe.num_experts, dtype=torch.float64, generator=generator, device=device)
    # the k largest of log(share) + Gumbel noise are k draws without replacement (arXiv:1903.06059, section 2)
    keys = shares.log() - (-uniform.log()).log()
    if moe.router.num_groups and moe.router.groups_per_token:
        keys = _in_groups(keys, moe.router.num_groups, moe.router.groups_per_token)
    return keys.topk(moe.top_k, dim=1).indices


def expert_shares(case: LayerCase) -> tuple[float, ...]:
    """How likely each expert is, over all ranks; not normalised.

    A power law's experts are dealt to the ranks like cards, the most popular first, so that this rank, the
    first, has the largest load of a fair placement: the one that all others wait for.
    """
    routing, num_experts = case.routing, case.moe.num_experts
    if routing.kind == "trace":
        return tuple(max(share, _RARE) for share in routing.shares)
    local = case.num_local_experts
    places = (expert % local * case.ep_size + expert // local for expert in range(num_experts))
    return tuple(_popularity(routing, place + 1) for place in places)


_RARE = 1e-9
"""Share of an expert that a trace never saw, so that it is drawn only where nothing else is left."""


def _popularity(routing: LayerRouting, rank: int) -> float:
    return float(rank**-routing.exponent) if routing.kind == "power_law" else 1.0


def _in_groups(keys: Tensor, num_groups: int, groups_per_token: int) -> Tensor:
    """The keys, those outside the best groups of a token at minus infinity."""
    grouped = keys.view(len(keys), num_groups, -1)
    best = grouped.amax(dim=2).topk(groups_per_token, dim=1).indices
    is_open = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=keys.device).scatter_(1, best, True)
    return grouped.masked_fill(~is_open[:, :, None], -torch.inf).view_as(keys)


def _logits(choices: Tensor, *, num_experts: int, generator: torch.Generator) -> Tensor:
    device = choices.device
    others = torch.empty(len(choices), num_experts, dtype=torch.float64, device=device)
    others.uniform_(*OTHER_LOGITS, generator=generator)
    chosen = torch.empty(choices.shape, dtype=torch.float64, device=device)
    return others.scatter_(1, choices, chosen.uniform_(*CHOSEN_LOGITS, generator=generator))
