"""Curves of one recipe: what a size costs, crosses and is refused for."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest

from moe_bench.analysis.collectives import Group
from moe_bench.errors import BadInputError, RecipeError
from moe_bench.projection.constants import Constants
from moe_bench.projection.scaleout import MAX_GPUS, Level, level, quantile_s, scale_out
from moe_bench.projection.step import project
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root(), rules=())
DEEPSEEK = LOADER.recipe(find_recipe("deepseek_v3", LOADER))
GB300 = LOADER.recipe(find_recipe("deepseek_v3/gb300_nvl72_256g_mxfp8", LOADER))


def test_the_smallest_size_is_the_reference_and_efficiency_falls_with_size() -> None:
    curve = scale_out(DEEPSEEK, [4096, 256, 1024, MAX_GPUS], strong=False)
    assert [point.num_gpus for point in curve.points] == [256, 1024, 4096, MAX_GPUS]
    ratios = [point.efficiency_ratio for point in curve.points]
    assert ratios[0] == 1
    assert ratios == sorted(ratios, reverse=True)


def test_weak_scaling_loses_little_per_doubling_and_strong_scaling_more() -> None:
    weak = scale_out(DEEPSEEK, [256, 512], strong=False).points[1].efficiency_ratio
    strong = scale_out(DEEPSEEK, [256, 512], strong=True).points[1].efficiency_ratio
    assert 0.98 < weak < 1
    assert strong < weak


def test_a_size_that_breaks_a_rule_is_named_with_it_and_the_others_stay() -> None:
    curve = scale_out(DEEPSEEK, [256, 300, 512], strong=False)
    assert [point.num_gpus for point in curve.points] == [256, 512]
    assert [size.num_gpus for size in curve.refused] == [300]
    assert "nearest legal sizes: 256 and 512" in curve.refused[0].rule
    with pytest.raises(RecipeError, match="num-gpus 300"):
        scale_out(DEEPSEEK, [300], strong=False)


def test_beyond_published_sizes_nothing_is_projected() -> None:
    with pytest.raises(BadInputError, match="no published run is that large"):
        scale_out(DEEPSEEK, [2 * MAX_GPUS], strong=False)


def test_changes_of_the_user_are_in_the_names_of_other_sizes() -> None:
    curve = scale_out(DEEPSEEK, [256, 512], strong=False, changes=("micro_batch_size=1",))
    assert curve.points[0].projection.recipe is DEEPSEEK
    assert curve.points[1].projection.recipe.name.endswith("_micro_batch_size_1")


def test_the_load_is_that_of_each_size() -> None:
    heavy = scale_out(DEEPSEEK, [256], strong=False, load="power_law:0.5")
    even = scale_out(DEEPSEEK, [256], strong=False, load="balanced")
    assert heavy.points[0].projection.step_s > even.points[0].projection.step_s


def test_the_median_of_steps_is_the_projection_and_quantiles_rise() -> None:
    projection, constants = project(DEEPSEEK), Constants()
    quantiles = [quantile_s(projection, share, constants) for share in (0.1, 0.5, 0.9, 0.99)]
    assert quantiles[1] == pytest.approx(projection.step_s)
    assert quantiles == sorted(quantiles)


def test_the_spread_between_quantiles_is_that_of_the_largest_of_many_normal_variables() -> None:
    """Exactly, the largest of n lies below x with probability Phi(x)^n."""
    projection, constants = project(DEEPSEEK), Constants()
    num_gpus, sigma = 256, constants.straggler_std
    alone_s = projection.step_s / (1 + sigma * math.sqrt(2 * math.log(num_gpus)))
    low, high = (quantile_s(projection, share, constants) for share in (0.5, 0.9))
    exact = [NormalDist().inv_cdf(share ** (1 / num_gpus)) for share in (0.5, 0.9)]
    assert (high - low) / (alone_s * sigma) == pytest.approx(exact[1] - exact[0], rel=0.15)


def test_one_rank_waits_for_nobody() -> None:
    one = LOADER.recipe(find_recipe("moonlight_16b_a3b", LOADER))
    parallel = one.parallel.model_copy(update={"num_gpus": 1, "expert": 1})
    small = one.model_copy(update={"parallel": parallel})
    projection, constants = project(small), Constants()
    assert quantile_s(projection, 0.5, constants) == pytest.approx(projection.step_s)


def test_levels_of_the_fabric_follow_the_placement() -> None:
    assert level(DEEPSEEK, Group.TENSOR) is Level.GPU
    assert level(GB300, Group.EXPERT) is Level.NVLINK
    assert level(DEEPSEEK, Group.EXPERT) is Level.LEAF  # 64 ranks, 8 nodes
    points = scale_out(DEEPSEEK, [256, 4096, MAX_GPUS], strong=False).points
    assert [point.data_level for point in points] == [Level.LEAF, Level.SPINE, Level.CORE]
    assert [point.pipeline_level for point in points] == [Level.LEAF, Level.CORE, Level.CORE]
