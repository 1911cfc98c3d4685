"""How tokens choose experts and with what weight, written out plainly."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moe_bench.spec.model import MixtureOfExperts, Router


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the router says of each token."""

    experts: Tensor
    """[tokens, top_k], the chosen, best first."""
    probabilities: Tensor
    """[tokens, top_k], the weight of each."""


def choose(logits: Tensor, moe: MixtureOfExperts, expert_bias: Tensor | None) -> Choice:
    """Choose by logits [tokens, experts], in FP32 or better.

        s = softmax(l), sigmoid(l) or sqrt(softplus(l)); chosen are the top k of s + bias in the best groups
        p = s, divided by the sum over the chosen where the router renormalises, times the scaling factor

    Softmax over all experts, renormalised over the chosen, is softmax over the chosen (GPT-OSS). Groups are
    those of arXiv:2412.19437, 2.1.2: a group counts as much as its best top_k / groups_per_token scores.
    """
    router = moe.router
    scores = _scores(logits.to(torch.promote_types(logits.dtype, torch.float32)), router)
    biased = scores if expert_bias is None else scores + expert_bias
    experts = _within_best_groups(biased, moe).topk(moe.top_k, dim=-1).indices
    probabilities = scores.gather(-1, experts)
    if router.renormalise:
        probabilities = probabilities / probabilities.sum(dim=-1, keepdim=True)
    return Choice(experts=experts, probabilities=probabilities * router.scaling_factor)


def _scores(logits: Tensor, router: Router) -> Tensor:
    if router.score_function == "softmax":
        return logits.softmax(dim=-1)
    if router.score_function == "sigmoid":
        return logits.sigmoid()
    return functional.softplus(logits).sqrt()


def _within_best_groups(scores: Tensor, moe: MixtureOfExperts) -> Tensor:
    """The scores, with -inf in the groups that a token may not choose from."""
    num_groups, num_chosen = moe.router.num_groups, moe.router.groups_per_token
    if num_groups is None or num_chosen is None:
        return scores
    grouped = scores.unflatten(-1, (num_groups, -1))
    group_scores = grouped.topk(moe.top_k // num_chosen, dim=-1).values.sum(dim=-1)
    is_closed = torch.ones_like(group_scores, dtype=torch.bool)
    is_closed.scatter_(-1, group_scores.topk(num_chosen, dim=-1).indices, False)
    return grouped.masked_fill(is_closed.unsqueeze(-1), float("-inf")).flatten(-2)
