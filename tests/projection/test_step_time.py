"""Steps add up, grow with what they contain, and come out the same alone or among others."""

from __future__ import annotations

import numpy as np
import pytest

from moe_bench.projection.constants import Constants
from moe_bench.projection.step_time import step_table, step_times
from moe_bench.projection.step_work import step_work
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

LOADER = Loader(root=recipes_root(), rules=())
NAMES = (
    "deepseek_v3/h100_sxm_1024g_bf16",
    "qwen3_30b_a3b/h100_sxm_16g_bf16",
    "mixtral_8x22b/h100_sxm_128g_bf16_fsdp",
    "gpt_oss_120b/gb200_nvl72_64g_bf16",
)


def recipe_named(name: str, *changes: str) -> Recipe:
    return LOADER.recipe(find_recipe(name, LOADER), changes=changes)


def seconds(*recipes: Recipe, constants: Constants | None = None) -> np.ndarray:
    table = step_table([step_work(recipe) for recipe in recipes])
    return step_times(table, constants or Constants()).step_s


def test_recipes_do_not_touch_each_other_in_one_table() -> None:
    recipes = [recipe_named(name) for name in NAMES]
    together = seconds(*recipes)
    alone = [float(seconds(recipe)[0]) for recipe in recipes]
    assert together == pytest.approx(alone, rel=1e-12)


@pytest.mark.parametrize(
    ("constant", "factor"),
    [
        ("sustained_fraction", 0.8),
        ("memory_fraction", 0.8),
        ("alltoall_nic_fraction", 0.8),
        ("nvlink_fraction", 0.8),
        ("launch_s", 2.0),
        ("straggler_std", 2.0),
        ("stream_fraction", 0.8),
        ("sustained_attention_fraction", 0.8),
    ],
)
def test_every_constant_of_a_hopper_step_slows_it(constant: str, factor: float) -> None:
    recipe = recipe_named("qwen3_235b_a22b/h100_sxm_256g_bf16_alltoall")
    base = Constants()
    worse = base.with_values((constant,), (getattr(base, constant) * factor,))
    assert seconds(recipe, constants=worse)[0] > seconds(recipe, constants=base)[0]


def test_the_share_of_the_network_is_that_of_the_dispatcher() -> None:
    base = Constants()
    flex = recipe_named("qwen3_235b_a22b/h100_sxm_256g_bf16_deepep")
    for constant, does_change in (("nic_fraction", True), ("alltoall_nic_fraction", False)):
        worse = base.with_values((constant,), (0.5 * getattr(base, constant),))
        is_slower = seconds(flex, constants=worse)[0] > seconds(flex, constants=base)[0] * (1 + 1e-9)
        assert bool(is_slower) is does_change


def test_overlapped_dispatch_costs_what_it_takes_from_the_kernels_beside_it() -> None:
    base = Constants()
    overlapped = recipe_named("qwen3_235b_a22b/h100_sxm_256g_bf16_deepep_overlap")
    lossless = base.with_values(("overlap_loss",), (0.0,))
    times = step_times(step_table([step_work(overlapped)]), base)
    free = step_times(step_table([step_work(overlapped)]), lossless)
    traffic = times.layers.expert_traffic_s.sum(1)
    exposed = times.layers.expert_s.sum(1)
    hidden = free.layers.expert_s.sum(1)
    is_moe = traffic > 0
    assert hidden[is_moe] == pytest.approx(0.0, abs=1e-12)
    assert exposed[is_moe] == pytest.approx(base.overlap_loss * traffic[is_moe])


def test_more_load_on_the_slowest_rank_takes_longer() -> None:
    recipe = recipe_named("qwen3_30b_a3b/h100_sxm_16g_bf16")
    steps = [
        float(step_times(step_table([step_work(recipe, load=load)]), Constants()).step_s[0])
        for load in (1.0, 1.25, 2.0)
    ]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_twice_the_micro_batches_cost_twice_the_pipeline_but_one_optimizer() -> None:
    small = recipe_named("deepseek_v3/h100_sxm_1024g_bf16")
    large = small.model_copy(update={"global_batch_size": 2 * small.global_batch_size})
    one, two = (step_times(step_table([step_work(recipe)]), Constants()) for recipe in (small, large))
    assert two.busy_s[0] == pytest.approx(2 * one.busy_s[0], rel=1e-12)
    assert two.bubble_s[0] == pytest.approx(one.bubble_s[0], rel=1e-9)
    assert two.optimizer_s[0] == one.optimizer_s[0]


def test_layers_of_a_rank_sum_to_its_time() -> None:
    recipe = recipe_named("deepseek_v3/h100_sxm_1024g_bf16")
    work = step_work(recipe)
    times = step_times(step_table([work]), Constants())
    critical = int(times.critical_rank[0])
    busy = sum(
        number * times.layers.total_s[layer].sum()
        for chunk, counts in zip(work.lowered.chunks, work.chunk_counts, strict=True)
        if chunk.pipeline_rank == critical
        for layer, number in counts.items()
    )
    assert times.busy_s[0] == pytest.approx(recipe.num_micro_batches * busy, rel=1e-12)
