"""Load of the busiest rank: 1 when balanced, growing with skew and capacity, never above the capacity."""

from __future__ import annotations

import numpy as np
import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.work.load import (
    lognormal,
    popularity_load,
    power_law,
    recipe_load,
    recorded_load,
    sigma_of_gini,
)
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe, TokenDrop

LOADER = Loader(root=recipes_root(), rules=())
NAME = "qwen3_30b_a3b/h100_sxm_16g_bf16"
NUM_EXPERTS = 128


def recipe_with(capacity: float | None = None, *, pads: bool = False) -> Recipe:
    recipe = LOADER.recipe(find_recipe(NAME, LOADER))
    drop = None if capacity is None else TokenDrop(capacity_factor=capacity, pad_to_capacity=pads)
    return recipe.model_copy(update={"token_drop": drop})


def test_no_skew_is_balanced() -> None:
    for popularity in (power_law(NUM_EXPERTS, 0), lognormal(NUM_EXPERTS, 0)):
        assert popularity_load(recipe_with(), popularity) == pytest.approx(1.0, rel=1e-12)


def test_load_grows_with_skew() -> None:
    power = [popularity_load(recipe_with(), power_law(NUM_EXPERTS, alpha)) for alpha in (0, 0.3, 0.6, 1.2)]
    spread = [popularity_load(recipe_with(), lognormal(NUM_EXPERTS, sigma)) for sigma in (0, 0.2, 0.5, 1.0)]
    assert power == sorted(power)
    assert spread == sorted(spread)
    assert power[-1] > 1.5


def test_load_grows_with_the_capacity_and_stays_below_it() -> None:
    skewed = power_law(NUM_EXPERTS, 1.2)
    capacities = (1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
    loads = [popularity_load(recipe_with(capacity), skewed) for capacity in capacities]
    assert loads == sorted(loads)
    assert all(load <= capacity for load, capacity in zip(loads, capacities, strict=True))
    assert popularity_load(recipe_with(), skewed) >= loads[-1]


def test_experts_padded_to_their_capacity_receive_it_whatever_the_skew() -> None:
    padded = recipe_with(1.5, pads=True)
    assert popularity_load(padded, power_law(NUM_EXPERTS, 1.2)) == pytest.approx(1.0)


def test_a_recorded_trace_is_read_in_the_order_of_its_experts() -> None:
    recipe = recipe_with()
    local = NUM_EXPERTS // recipe.parallel.expert
    counts = np.ones(NUM_EXPERTS)
    counts[:local] = 3.0  # the first rank gets three times what each other gets
    expected = 3.0 / ((3.0 + recipe.parallel.expert - 1) / recipe.parallel.expert)
    assert recorded_load(recipe, [counts.tolist()]) == pytest.approx(expected)


def test_the_spread_has_the_gini_coefficient_that_was_asked_for() -> None:
    shares = np.sort(lognormal(20_000, sigma_of_gini(0.3)))
    ranks = np.arange(1, len(shares) + 1)
    gini = 2 * (ranks * shares).sum() / (len(shares) * shares.sum()) - (len(shares) + 1) / len(shares)
    assert gini == pytest.approx(0.3, abs=0.002)


def test_random_logits_are_nearly_balanced_and_round_robin_is() -> None:
    recipe = recipe_with()
    assert 1.0 < recipe_load(recipe) < 1.03
    routing = recipe.routing.model_copy(update={"mode": "round_robin"})
    assert recipe_load(recipe.model_copy(update={"routing": routing})) == 1.0


def test_natural_routing_is_less_balanced_than_random_logits() -> None:
    recipe = recipe_with()
    routing = recipe.routing.model_copy(update={"mode": "natural"})
    assert recipe_load(recipe.model_copy(update={"routing": routing})) > recipe_load(recipe)


def test_a_trace_of_another_model_is_refused() -> None:
    with pytest.raises(BadInputError, match="64 experts in the routing, qwen3_30b_a3b has 128"):
        recorded_load(recipe_with(), [[1.0] * 64])


def test_an_empty_trace_is_refused() -> None:
    with pytest.raises(BadInputError, match="no layer"):
        recorded_load(recipe_with(), [])
