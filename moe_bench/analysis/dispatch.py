"""What dispatch and combine of one expert layer carry per micro batch, by dispatcher, for balanced routing.

Megatron-Core 0.19.2, transformer/moe/token_dispatcher.py and fused_a2a.py. Backward, a dispatch is a combine
and the other way round, with the same bytes.
"""

from __future__ import annotations

import math

from moe_bench.analysis.activations import activation_element_bytes, token_counts
from moe_bench.analysis.collectives import Call, Collective, Exchange, Group
from moe_bench.spec.model import MixtureOfExperts
from moe_bench.spec.recipe import Recipe, RecomputeModule

COUNT_BYTES = 8
"""A number of tokens: int64."""
INDEX_BYTES = 4
"""An expert's index on its way: int32 (deepseek-ai/DeepEP, csrc/kernels/internode.cu)."""
MOE: frozenset[RecomputeModule] = frozenset({"moe"})
GATHER, SCATTER, TO_ALL = Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_TO_ALL


def dispatch_exchanges(recipe: Recipe, moe: MixtureOfExperts) -> tuple[Exchange, ...]:
    """Dispatch, combine and the numbers that they need first."""
    if recipe.dispatch.dispatcher == "alltoall":
        return _all_to_all(recipe, moe)
    if recipe.dispatch.dispatcher == "allgather":
        return _all_gather(recipe, moe)
    return _flex(recipe, moe)


def dispatched_rows(recipe: Recipe, moe: MixtureOfExperts) -> int:
    """Token copies that a rank sends: t k, or E C where experts are padded to their capacity C."""
    copies = token_counts(recipe).sharded * moe.top_k
    drop = recipe.token_drop
    if drop is None or not drop.pad_to_capacity:
        return copies
    return moe.num_experts * drop.capacity(num_choices=copies, num_experts=moe.num_experts)


def probability_bytes(recipe: Recipe) -> int:
    """Bytes of a routing probability, which keeps the type of the routing scores (TopKRouter.routing)."""
    named = {"fp32": 4, "fp64": 8}
    dtype = recipe.dispatch.router_dtype
    return activation_element_bytes(recipe) if dtype is None else named[dtype]


def _all_to_all(recipe: Recipe, moe: MixtureOfExperts) -> tuple[Exchange, ...]:
    """Tokens r H a out and back, probabilities p r out; counts 8 E of every rank, unless padded.

    ETP ranks gather each other's rows, and reduce-scatter the results in the type of the probabilities
    (combine_preprocess).
    """
    hidden, etp = recipe.model.expert_hidden_size, recipe.parallel.expert_tensor
    rows, prob = dispatched_rows(recipe, moe), probability_bytes(recipe)
    tokens = rows * hidden * activation_element_bytes(recipe)
    exchanges = [
        _both_ways(TO_ALL, TO_ALL, Group.EXPERT, tokens, "dispatch"),
        _both_ways(TO_ALL, TO_ALL, Group.EXPERT, rows * prob, "probabilities"),
        _both_ways(GATHER, SCATTER, Group.EXPERT_TENSOR, etp * tokens, "dispatch"),
        _both_ways(GATHER, SCATTER, Group.EXPERT_TENSOR, etp * rows * prob, "probabilities"),
        _both_ways(SCATTER, GATHER, Group.EXPERT_TENSOR, etp * rows * hidden * prob, "combine"),
        _both_ways(TO_ALL, TO_ALL, Group.EXPERT, tokens, "combine"),
    ]
    if recipe.token_drop is None or not recipe.token_drop.pad_to_capacity:
        counts = COUNT_BYTES * moe.num_experts * etp * recipe.parallel.expert
        exchanges.append(_forward_only(GATHER, Group.EXPERT_TENSOR_EXPERT, counts, "token counts"))
    return tuple(exchanges)


def _all_gather(recipe: Recipe, moe: MixtureOfExperts) -> tuple[Exchange, ...]:
    """Every rank of ETP x EP gets all tokens, n t H a, all probabilities, n t E p, and the map, n t E.

    The results are reduce-scattered in the type of the probabilities (token_combine).
    """
    group = Group.EXPERT_TENSOR_EXPERT
    prob = probability_bytes(recipe)
    rows = recipe.parallel.expert_tensor * recipe.parallel.expert * token_counts(recipe).sharded
    hidden = rows * recipe.model.expert_hidden_size
    return (
        _forward_only(GATHER, group, rows * moe.num_experts, "routing map"),
        _both_ways(GATHER, SCATTER, group, rows * moe.num_experts * prob, "probabilities"),
        _both_ways(GATHER, SCATTER, group, hidden * activation_element_bytes(recipe), "dispatch"),
        _both_ways(SCATTER, GATHER, group, hidden * prob, "combine"),
    )


def _flex(recipe: Recipe, moe: MixtureOfExperts) -> tuple[Exchange, ...]:
    """DeepEP and HybridEP: a token goes once to each NVLink domain that needs it, there once to each rank.

    RDMA: t (H a + k (4 + p)) D(N) (N - 1) / N for N domains; NVLink: t (..) D(R) (g - 1) / g for R ranks, g
    to a domain. D is `expected_groups`. Indices and probabilities go with the tokens out and probabilities
    alone with the gradients back (fused_a2a.py); the combine carries tokens only. From the dispatchers'
    algorithm (deepseek-ai/DeepEP, README and csrc/kernels/internode.cu); not measured here.
    """
    etp = recipe.parallel.expert_tensor
    num_ranks = etp * recipe.parallel.expert
    domain = min(num_ranks, recipe.system.nvlink_domain_gpus)
    num_domains = max(1, num_ranks // domain)
    rows = token_counts(recipe).sharded
    tokens = rows * recipe.model.expert_hidden_size * activation_element_bytes(recipe)
    routing = rows * moe.top_k * (INDEX_BYTES + probability_bytes(recipe))
    to_ranks = etp * expected_groups(recipe, moe, num_groups=recipe.parallel.expert) * (domain - 1) / domain
    to_domains = expected_groups(recipe, moe, num_groups=num_domains) * (num_domains - 1) / num_domains
    exchanges = []
    for op, copies in ((Collective.RDMA, to_domains), (Collective.NVLINK, to_ranks)):
        out, back = round((tokens + routing) * copies), round(tokens * copies)
        exchanges.append(_both_ways(op, op, Group.EXPERT_TENSOR_EXPERT, out, "dispatch"))
        exchanges.append(_both_ways(op, op, Group.EXPERT_TENSOR_EXPERT, back, "combine"))
    return tuple(exchanges)


def expected_groups(recipe: Recipe, moe: MixtureOfExperts, *, num_groups: int) -> float:
    """D: how many of `num_groups` equal groups of experts (ranks, or NVLink domains) a token goes to.

    `round_robin`: counted, since a token's experts are neighbours. Otherwise every choice of k experts,
    within the routing groups that a token may use, is taken to be as likely as any other: with g of n routing
    groups open to a token, D = G [1 - sum_j P(j) C(A - j, k) / C(A, k)], A = E g / n, where P(j) is the
    probability that j of the group's E / G experts are open; without routing groups D =
    G [1 - C(E - E / G, k) / C(E, k)] (deepseek-ai/DeepEP, get_theoretical_num_sms).
    """
    if recipe.routing.mode == "round_robin":
        return _round_robin_groups(moe, num_groups=num_groups)
    router = moe.router
    per_group = moe.num_experts // num_groups
    routing_groups = router.num_groups or 1
    open_groups = router.groups_per_token or routing_groups
    num_open = moe.num_experts * open_groups // routing_groups
    per_routing_group = moe.num_experts // routing_groups
    spanned = max(1, per_group // per_routing_group)
    missed = 0.0
    for num_hit in range(min(spanned, open_groups) + 1):
        chance = math.comb(spanned, num_hit) * math.comb(routing_groups - spanned, open_groups - num_hit)
        experts = num_hit * min(per_group, per_routing_group)
        missed += chance * math.comb(num_open - experts, moe.top_k) / math.comb(num_open, moe.top_k)
    return num_groups * (1 - missed / math.comb(routing_groups, open_groups))


def _round_robin_groups(moe: MixtureOfExperts, *, num_groups: int) -> float:
    """Groups that experts first to first + k - 1 lie in, on average over the first experts that occur."""
    per_group = moe.num_experts // num_groups
    step = math.gcd(moe.num_experts, moe.top_k)
    counts = [
        len({(first + chosen) % moe.num_experts // per_group for chosen in range(moe.top_k)})
        for first in range(0, moe.num_experts, step)
    ]
    return sum(counts) / len(counts)


def _both_ways(
    forward: Collective, backward: Collective, group: Group, num_bytes: int, what: str
) -> Exchange:
    return Exchange(
        forward=(Call(forward, group, num_bytes, what),),
        backward=(Call(backward, group, num_bytes, what),),
        repeated_by=MOE,
    )


def _forward_only(op: Collective, group: Group, num_bytes: int, what: str) -> Exchange:
    return Exchange(forward=(Call(op, group, num_bytes, what),), repeated_by=MOE)
