"""Loads of an untrained router beside what can be counted."""

from __future__ import annotations

import pytest

from moe_bench.projection.rows.untrained import UntrainedLoads, untrained_loads
from moe_bench.spec.recipe import Recipe
from tests.projection.published_rows import inferred


def qwen(**columns: object) -> Recipe:
    """Qwen3-30B-A3B, 48 layers of 128 experts of which a token takes 8."""
    return inferred(model="Qwen3-30B-A3B", **({"num_gpus": 16, "tp": 1, "pp": 1, "ep": 8} | columns)).recipe


def loads(recipe: Recipe) -> UntrainedLoads:
    assert recipe.model.moe is not None
    return untrained_loads(recipe, recipe.model.moe)


def test_one_rank_has_all_experts_and_the_mean() -> None:
    assert loads(qwen(ep=1)) == UntrainedLoads(stage_ratio=1.0, layer_ratio=1.0)


def test_no_rank_receives_more_than_its_experts_can_take() -> None:
    # a token takes 8 of 128, and each of 32 ranks has 4 of them
    busiest = loads(qwen(num_gpus=32, ep=32)).layer_ratio
    assert busiest <= 4 * 32 / 8
    assert busiest % (32 / 8) == pytest.approx(0.0)


def test_layers_make_up_for_each_other() -> None:
    whole, cut = loads(qwen()), loads(qwen(pp=2))
    assert 1 < whole.stage_ratio < cut.stage_ratio < cut.layer_ratio
