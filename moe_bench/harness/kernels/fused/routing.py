"""From a router's logits to probabilities and routing map in one Triton kernel, and back in another.

For a token with logits l, experts e and the chosen k of them:

    v = exp(l - max l), sigmoid(l) or sqrt(log(1 + exp l)),  w_e = v_e / Z,  Z = sum of v over the pool
    p_e = scale * w_e where e counts, else 0
    dl_e = v'(l_e) / Z * (scale * g_e - sum over f of scale * g_f * w_f) in the pool, else 0

The pool is the chosen experts, or all of them for softmax before top-k and for the scores that the balancing
losses read, which count for all. Experts are chosen by the k largest of their scores, plus bias; with groups
only in those groups whose best scores add up to most (arXiv:2412.19437, section 2.1.2). Of equals the first
is chosen.

For t tokens, E experts and logits of 4 bytes: 9 t E bytes forward, 13 t E backward; kept are logits and map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

Score = Literal["softmax", "sigmoid", "sqrtsoftplus"]

BLOCK_ENTRIES = 1024
"""Logits of one program: 8 per thread, and rows of 256 experts lie inside a warp, whose maxima need no shared
memory."""
NUM_WARPS = 4
SUM_EPSILON = 1e-20
"""Added to sums that are not a softmax's (transformer/moe/moe_utils.py, topk_routing_with_score_function)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """How experts are scored and chosen."""

    top_k: int
    score: Score
    is_before: bool = False
    """Softmax over all experts, before top-k; without, over the chosen ones."""
    num_groups: int = 1
    groups_per_token: int = 1
    scale: float = 1.0
    is_for_losses: bool = False
    """Scores of all experts that add up to one, and the k largest of them: what balancing losses read."""

    @property
    def pools_all(self) -> bool:
        """Whether scores are normalised over all experts."""
        return self.is_for_losses or (self.score == "softmax" and self.is_before)

    @property
    def is_normalised(self) -> bool:
        """A single score that is no softmax is taken as it is."""
        return self.is_for_losses or self.score == "softmax" or self.top_k > 1

    @property
    def per_group(self) -> int:
        """Experts whose scores make a group's."""
        return self.top_k // self.groups_per_token


def route(logits: Tensor, choice: Choice, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Probabilities [tokens, experts] of the logits' type, zero where not chosen, and the boolean map.

    Args:
        logits: [tokens, experts].
        bias: FP32 [experts], added to the scores for the choice alone; softmax takes none.
    """
    return _Route.apply(logits, None if choice.score == "softmax" else bias, choice)


def scores_for_losses(logits: Tensor, *, top_k: int, score: Score) -> tuple[Tensor, Tensor]:
    """Scores [tokens, experts] in FP32, each token's adding up to one, and the map of the k largest."""
    return _Route.apply(logits, None, Choice(top_k=top_k, score=score, is_for_losses=True))


class _Route(torch.autograd.Function):
    """Keeps the logits, and the map where only chosen experts count."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, bias: Tensor | None, choice: Choice) -> tuple[Tensor, Tensor]:
        logits = logits.contiguous()
        num_tokens, num_experts = logits.shape
        weights_dtype = torch.promote_types(logits.dtype, torch.float32) if choice.is_for_losses else None
        weights = torch.empty_like(logits, dtype=weights_dtype)
        chosen = torch.empty_like(logits, dtype=torch.bool)
        if num_tokens:
            grid, sizes = _launch(num_tokens, num_experts, choice)
            _forward_kernel[grid](
                logits,
                logits if bias is None else bias.contiguous(),
                weights,
                chosen.view(torch.uint8),
                num_tokens,
                num_experts,
                top_k=choice.top_k,
                has_bias=bias is not None,
                num_groups=choice.num_groups,
                groups_per_token=choice.groups_per_token,
                per_group=choice.per_group,
                is_before=choice.is_before,
                **sizes,
            )
        ctx.choice = choice
        ctx.save_for_backward(logits, None if choice.is_for_losses else chosen)
        ctx.mark_non_differentiable(chosen)
        return weights, chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        logits, chosen = ctx.saved_tensors
        grad_logits = torch.empty_like(logits)
        if logits.shape[0]:
            grid, sizes = _launch(logits.shape[0], logits.shape[1], ctx.choice)
            _backward_kernel[grid](
                grad.contiguous(),
                logits,
                logits if chosen is None else chosen.view(torch.uint8),
                grad_logits,
                logits.shape[0],
                logits.shape[1],
                **sizes,
            )
        return grad_logits, None, None


def _launch(num_tokens: int, num_experts: int, choice: Choice) -> tuple[tuple[int], dict[str, Any]]:
    """Grid, and what both kernels are compiled for."""
    width = triton.next_power_of_2(num_experts // choice.num_groups)
    groups = triton.next_power_of_2(choice.num_groups)
    tokens = max(1, BLOCK_ENTRIES // (groups * width))
    return (triton.cdiv(num_tokens, tokens),), {
        "score": choice.score,
        "pools_all": choice.pools_all,
        "counts_all": choice.is_for_losses,
        "is_normalised": choice.is_normalised,
        "scale": choice.scale,
        "epsilon": SUM_EPSILON,
        "block_t": tokens,
        "block_g": groups,
        "block_e": width,
        "experts_per_group": num_experts // choice.num_groups,
        "num_warps": NUM_WARPS,
        "enable_fp_fusion": True,
    }


@triton.jit
def _places(
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    experts_per_group: tl.constexpr,
    block_t: tl.constexpr,
    block_g: tl.constexpr,
    block_e: tl.constexpr,
) -> tl.tensor:
    """Of a tile [tokens, groups * experts]: its experts, places in [tokens, experts], and which exist.

    Behind the last token stands the last one again, which is not stored.
    """
    columns = tl.arange(0, block_g * block_e)
    within = columns % block_e
    experts = columns // block_e * experts_per_group + within
    tokens = tl.program_id(0) * block_t + tl.arange(0, block_t)
    is_expert = (within < experts_per_group) & (experts < num_experts)
    is_stored = (tokens < num_tokens)[:, None] & is_expert[None, :]
    rows = tl.minimum(tokens, num_tokens - 1).to(tl.int64)
    return experts, rows[:, None] * num_experts + experts[None, :], is_expert, is_stored


@triton.jit
def _loaded(logits_ptr: tl.tensor, places: tl.tensor, is_expert: tl.tensor) -> tl.tensor:
    """Logits in FP32 or better, and whether each is one, [tokens, groups * experts]."""
    is_there = is_expert[None, :] & (places >= 0)
    logits = tl.load(logits_ptr + places, mask=is_there, other=0.0)
    if logits.dtype != tl.float64:
        logits = logits.to(tl.float32)
    return logits, is_there


@triton.jit
def _values(logits: tl.tensor, pool: tl.tensor, score: tl.constexpr) -> tl.tensor:
    """v of the module's docstring, zero outside the pool."""
    if score == "softmax":
        largest = tl.max(tl.where(pool, logits, float("-inf")), axis=1)
        # Twice, as outside the pool the difference may overflow.
        values = tl.exp(tl.where(pool, logits - largest[:, None], 0.0))
    elif score == "sigmoid":
        values = 1 / (1 + tl.exp(-logits))
    else:
        values = tl.sqrt(tl.maximum(logits, 0.0) + tl.log(1 + tl.exp(-tl.abs(logits))))
    return tl.where(pool, values, 0.0)


@triton.jit
def _total(
    values: tl.tensor, score: tl.constexpr, is_normalised: tl.constexpr, epsilon: tl.constexpr
) -> tl.tensor:
    """What the values of each token are divided by, [tokens, 1]."""
    total = tl.sum(values, axis=1)
    if not is_normalised:
        total = total * 0 + 1
    elif score != "softmax":
        total += epsilon
    return total[:, None]


@triton.jit
def _in_best_groups(
    scores: tl.tensor,
    groups_per_token: tl.constexpr,
    per_group: tl.constexpr,
    block_t: tl.constexpr,
    block_g: tl.constexpr,
    block_e: tl.constexpr,
) -> tl.tensor:
    """`scores` [tokens, groups * experts], minus infinity outside the chosen groups."""
    grouped = tl.reshape(scores, [block_t, block_g, block_e])
    within = tl.arange(0, block_e)[None, None, :]
    left = grouped
    best = tl.zeros([block_t, block_g], scores.dtype)
    for _ in tl.static_range(per_group):
        largest = tl.max(left, axis=2)
        best += largest
        first = tl.min(tl.where(left == largest[:, :, None], within, block_e), axis=2)
        left = tl.where(within == first[:, :, None], float("-inf"), left)
    group = tl.arange(0, block_g)[None, :]
    is_chosen = tl.zeros([block_t, block_g], tl.int32)
    for _ in tl.static_range(groups_per_token):
        largest = tl.max(best, axis=1)
        first = tl.min(tl.where(best == largest[:, None], group, block_g), axis=1)
        is_first = group == first[:, None]
        is_chosen = tl.where(is_first, 1, is_chosen)
        best = tl.where(is_first, float("-inf"), best)
    limited = tl.where((is_chosen != 0)[:, :, None], grouped, float("-inf"))
    return tl.reshape(limited, [block_t, block_g * block_e])


@triton.jit
def _forward_kernel(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    top_k: tl.constexpr,
    score: tl.constexpr,
    is_before: tl.constexpr,
    has_bias: tl.constexpr,
    pools_all: tl.constexpr,
    counts_all: tl.constexpr,
    is_normalised: tl.constexpr,
    num_groups: tl.constexpr,
    groups_per_token: tl.constexpr,
    per_group: tl.constexpr,
    scale: tl.constexpr,
    epsilon: tl.constexpr,
    block_t: tl.constexpr,
    block_g: tl.constexpr,
    block_e: tl.constexpr,
    experts_per_group: tl.constexpr,
) -> None:
    experts, places, is_expert, is_stored = _places(
        num_tokens, num_experts, experts_per_group, block_t, block_g, block_e
    )
    logits, is_there = _loaded(logits_ptr, places, is_expert)
    scores = logits
    if score != "softmax":
        scores = _values(logits, is_there, score)
    elif is_before and num_groups > 1:
        values = _values(logits, is_there, score)
        scores = values / _total(values, score, True, epsilon)
    if has_bias:
        bias = tl.load(bias_ptr + experts, mask=is_expert, other=0.0)
        scores += bias[None, :].to(scores.dtype)
    scores = tl.where(is_there, scores, float("-inf"))
    if num_groups > 1:
        scores = _in_best_groups(scores, groups_per_token, per_group, block_t, block_g, block_e)
    columns = tl.arange(0, block_g * block_e)[None, :]
    chosen = tl.zeros([block_t, block_g * block_e], tl.int32)
    for _ in tl.static_range(top_k):
        largest = tl.max(scores, axis=1)
        first = tl.min(tl.where(scores == largest[:, None], columns, block_g * block_e), axis=1)
        is_first = columns == first[:, None]
        chosen = tl.where(is_first, 1, chosen)
        scores = tl.where(is_first, float("-inf"), scores)
    is_chosen = (chosen != 0) & is_there
    values = _values(logits, is_there if pools_all else is_chosen, score)
    weights = values / _total(values, score, is_normalised, epsilon)
    if not counts_all:
        weights = tl.where(is_chosen, weights * scale, 0.0)
    tl.store(weights_ptr + places, weights.to(weights_ptr.dtype.element_ty), mask=is_stored)
    tl.store(chosen_ptr + places, is_chosen.to(tl.uint8), mask=is_stored)


@triton.jit
def _backward_kernel(
    grad_ptr: tl.tensor,
    logits_ptr: tl.tensor,
    chosen_ptr: tl.tensor,
    grad_logits_ptr: tl.tensor,
    num_tokens: tl.tensor,
    num_experts: tl.tensor,
    score: tl.constexpr,
    pools_all: tl.constexpr,
    counts_all: tl.constexpr,
    is_normalised: tl.constexpr,
    scale: tl.constexpr,
    epsilon: tl.constexpr,
    block_t: tl.constexpr,
    block_g: tl.constexpr,
    block_e: tl.constexpr,
    experts_per_group: tl.constexpr,
) -> None:
    _, places, is_expert, is_stored = _places(
        num_tokens, num_experts, experts_per_group, block_t, block_g, block_e
    )
    logits, is_there = _loaded(logits_ptr, places, is_expert)
    grad = tl.load(grad_ptr + places, mask=is_there, other=0.0).to(logits.dtype)
    pool = is_there
    if not counts_all:
        is_chosen = tl.load(chosen_ptr + places, mask=is_there, other=0) != 0
        grad = tl.where(is_chosen, grad * scale, 0.0)
        if not pools_all:
            pool = is_chosen
    values = _values(logits, pool, score)
    total = _total(values, score, is_normalised, epsilon)
    if is_normalised:
        grad = grad - tl.sum(grad * values, axis=1)[:, None] / total
    if score == "softmax":
        slopes = values
    elif score == "sigmoid":
        slopes = values * (1 - values)
    else:
        slopes = 1 / (1 + tl.exp(-logits)) / (2 * tl.where(pool, values, 1.0))
    grad_logits = tl.where(pool, slopes * grad / total, 0.0)
    tl.store(grad_logits_ptr + places, grad_logits.to(grad_logits_ptr.dtype.element_ty), mask=is_stored)
