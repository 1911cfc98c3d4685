"""A training's time, GPU-hours, energy and price, by hand."""

from __future__ import annotations

import pytest

from moe_bench.projection.cost import training_cost
from moe_bench.projection.step import project
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root(), rules=())


def test_a_training_costs_its_tokens_over_the_throughput() -> None:
    recipe = LOADER.recipe(find_recipe("qwen3_30b_a3b", LOADER))  # 16 H100 of 700 W
    projection = project(recipe)
    num_tokens = round(3600 * 16 * projection.tokens_per_s_per_gpu)  # an hour's
    cost = training_cost(projection, num_tokens=num_tokens)
    assert cost.time_s == pytest.approx(3600)
    assert cost.gpu_hours == pytest.approx(16)
    assert cost.max_energy_j == pytest.approx(16 * 700 * 3600)
    assert cost.price(per_gpu_hour=2.5) == pytest.approx(40)
