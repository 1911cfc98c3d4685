"""How many tokens the busiest rank receives, over the mean: balanced, random, skewed, or as recorded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from moe_bench.analysis.activations import token_counts
from moe_bench.errors import BadInputError
from moe_bench.projection.pricing import Floats
from moe_bench.spec.model import MixtureOfExperts
from moe_bench.spec.recipe import Recipe

NATURAL_GINI = 0.025
"""Inequality of experts' loads under a balancing loss: makes the busiest of eight experts 6 % heavier than
the mean, which explains the 4 % that natural routing costs Mixtral-8x22B (rows of Megatron-MoE-ModelZoo with
forced and natural routing). Traces of inference on real text have 0.10 to 0.38 (arXiv:2605.20982)."""
_NUM_PLACEMENTS = 32
"""Random placements of popular experts on ranks that the expected maximum is averaged over."""
_SEED = 20_250_101


def recipe_load(recipe: Recipe) -> float:
    """The load of the busiest rank that the recipe's routing mode leads to; 1 for a dense model.

    `round_robin` is balanced exactly, as is expert choice; `random_logits` up to chance, `biased` follows
    its logits' spread, `recorded` its trace, and `natural` has the inequality of experts that real text
    shows. Where experts change on the way up, it is the load of the first ones.
    """
    moe = recipe.model.moe
    is_even = recipe.routing.mode == "round_robin" or recipe.parallel.expert == 1
    if moe is None or is_even or moe.router.choice == "expert_choice":
        return 1.0
    if recipe.routing.mode == "recorded":
        return recorded_load(recipe, recipe.routing.trace)
    chance = _chance(recipe, moe)
    if recipe.routing.mode == "random_logits":
        return 1 + chance
    sigma = recipe.routing.bias_std if recipe.routing.mode == "biased" else sigma_of_gini(NATURAL_GINI)
    return max(1 + chance, popularity_load(recipe, lognormal(moe.num_experts, sigma)))


def popularity_load(recipe: Recipe, popularity: Sequence[float] | Floats) -> float:
    """Load of the busiest rank where expert i draws a share of tokens proportional to `popularity[i]`.

    Averaged over random placements of experts on ranks. With a capacity factor c an expert takes no more than
    c times the mean; padded to it, it takes exactly that. Raises BadInputError unless every expert has a
    popularity.
    """
    _require_experts(recipe, len(popularity))
    shares = _capped(recipe, np.asarray(popularity, dtype=float))
    order = np.random.default_rng(_SEED)
    loads = [_busiest(recipe, order.permutation(shares)) for _ in range(_NUM_PLACEMENTS)]
    return float(np.mean(loads))


def recorded_load(recipe: Recipe, tokens_per_expert: Sequence[Sequence[float]]) -> float:
    """Mean over layers of the busiest rank's load, from recorded counts [layer][expert], experts in order."""
    loads = []
    for counts in tokens_per_expert:
        _require_experts(recipe, len(counts))
        loads.append(_busiest(recipe, _capped(recipe, np.asarray(counts, dtype=float))))
    if not loads:
        raise BadInputError("the routing trace has no layer; record at least one")
    return float(np.mean(loads))


def power_law(num_experts: int, alpha: float) -> Floats:
    """Popularity of expert i, (i + 1)^-alpha; 0 is uniform."""
    popularity: Floats = np.arange(1, num_experts + 1, dtype=float) ** -alpha
    return popularity


def lognormal(num_experts: int, sigma: float) -> Floats:
    """Popularity at the middle quantiles of a lognormal distribution: e^(sigma z); 0 is uniform."""
    quantile = NormalDist().inv_cdf
    return np.array([math.exp(sigma * quantile((i + 0.5) / num_experts)) for i in range(num_experts)])


def sigma_of_gini(gini: float) -> float:
    """Spread of a lognormal distribution with this Gini coefficient, G = 2 Phi(sigma / sqrt 2) - 1."""
    return math.sqrt(2) * NormalDist().inv_cdf((1 + gini) / 2)


def _busiest(recipe: Recipe, shares: Floats) -> float:
    """Largest mean share of one rank's experts; shares have mean 1 before dropping."""
    return float(shares.reshape(recipe.parallel.expert, -1).mean(1).max())


def _capped(recipe: Recipe, popularity: Floats) -> Floats:
    """Popularity with mean 1, cut at the capacity; all 1 where experts are padded to their capacity, which
    `dispatched_rows` counts already.
    """
    if popularity.min() < 0 or popularity.sum() <= 0:
        raise BadInputError("popularities must be numbers above 0; correct the routing trace")
    shares = popularity / popularity.mean()
    drop = recipe.token_drop
    if drop is None:
        return shares
    if drop.pad_to_capacity:
        return np.ones_like(shares)
    floor = 0.0
    if drop.min_capacity and recipe.model.moe is not None:
        moe = recipe.model.moe
        floor = drop.min_capacity * moe.num_experts / (token_counts(recipe).sharded * moe.top_k)
    return np.minimum(shares, max(drop.capacity_factor, floor))


def _require_experts(recipe: Recipe, num_given: int) -> None:
    moe = recipe.model.moe
    if moe is None:
        raise BadInputError(f"{recipe.name}: a dense model routes nothing; leave the skew out")
    if num_given != moe.num_experts:
        raise BadInputError(
            f"{num_given} experts in the routing, {recipe.model.key} has {moe.num_experts}; record this model"
        )


def _chance(recipe: Recipe, moe: MixtureOfExperts) -> float:
    """Expected excess of the busiest rank where every token draws its experts at random.

    A rank receives one in R of R t k draws, so its load varies by sqrt((1 - 1 / R) / (t k)); the largest of R
    normal variables lies sqrt(2 ln R) deviations up, at most.
    """
    ranks = recipe.parallel.expert
    drawn = token_counts(recipe).sharded * moe.top_k
    spread = math.sqrt(max(0.0, 1 - 1 / ranks) / drawn)
    return spread * math.sqrt(2 * math.log(ranks))
