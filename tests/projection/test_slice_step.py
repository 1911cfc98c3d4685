"""A full run projected from the compute of one rank: what scales with it, and what does not."""

from __future__ import annotations

import pytest

from moe_bench.analysis.memory import rank_fits
from moe_bench.projection.slice_step import (
    modelled_rank,
    project_from_slice,
    slice_estimate,
)
from moe_bench.projection.step import project
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.derive_slice import SliceChoice, slice_plan
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import Plan

LOADER = Loader(root=recipes_root())


def recipe_of(name: str) -> Recipe:
    return LOADER.recipe(find_recipe(name, LOADER))


def slice_of(recipe: Recipe) -> Plan:
    return slice_plan(recipe, fits=rank_fits, modified=(), choice=SliceChoice(kernels="torch_native"))


@pytest.mark.parametrize("name", ["deepseek_v3/h100_sxm_1024g_bf16", "qwen3_30b_a3b", "gpt_oss_120b"])
def test_a_rank_as_fast_as_modelled_gives_the_projection(name: str) -> None:
    asked = recipe_of(name)
    plan = slice_of(asked)
    full = plan.whole
    assert full is not None
    modelled = modelled_rank(plan.recipe, plan.pipeline_rank)
    found = project_from_slice(plan, micro_batch_s=modelled.micro_batch_s, optimizer_s=modelled.optimizer_s)
    # a flex dispatcher, which loopback groups stand in for, permutes without our kernel
    permutes = plan.recipe.kernels.fusions.model_copy(update={"permute": full.kernels.fusions.permute})
    assert full.kernels == plan.recipe.kernels.model_copy(update={"fusions": permutes})
    assert full.num_micro_batches == asked.num_micro_batches
    assert found.step_s == pytest.approx(project(full).step_s, rel=5e-3)


def test_a_rank_half_as_fast_doubles_its_kernels_and_leaves_what_is_sent() -> None:
    asked = recipe_of("qwen3_235b_a22b")
    plan = slice_of(asked)
    full = plan.whole
    assert full is not None
    modelled = modelled_rank(plan.recipe, plan.pipeline_rank)
    at, half = (
        {
            term.name: term.seconds
            for term in project_from_slice(plan, micro_batch_s=factor * modelled.micro_batch_s).terms
        }
        for factor in (1, 2)
    )
    for name in ("attention projections", "attention", "experts", "router"):
        assert half[name] == pytest.approx(2 * at[name])
    for name in ("optimizer", "tensor parallel"):
        assert half[name] == pytest.approx(at[name])


def test_the_measured_optimizer_takes_the_place_of_the_modelled() -> None:
    asked = recipe_of("qwen3_30b_a3b")
    plan = slice_of(asked)
    found = project_from_slice(plan, micro_batch_s=0.5, optimizer_s=3.0)
    assert [term.seconds for term in found.terms if term.name == "optimizer"] == [3.0]
    assert sum(term.seconds for term in found.terms) == pytest.approx(found.step_s)


def test_compute_alone_takes_less_than_compute_and_traffic() -> None:
    asked = recipe_of("qwen3_30b_a3b")
    assert asked.parallel.pipeline == 1
    rank = modelled_rank(asked, 0)
    assert asked.num_micro_batches * rank.micro_batch_s < project(asked).step_s


def test_the_estimate_grows_with_the_steps() -> None:
    asked = recipe_of("deepseek_v3/h100_sxm_256g_bf16")
    plan = slice_of(asked)
    recipe = plan.recipe
    more = plan.model_copy(
        update={
            "recipe": recipe.model_copy(update={"steps": recipe.steps.model_copy(update={"num_timed": 9})})
        }
    )
    rank = modelled_rank(recipe, plan.pipeline_rank)
    step_s = recipe.num_micro_batches * rank.micro_batch_s + rank.optimizer_s
    assert slice_estimate(more)[0] - slice_estimate(plan)[0] == pytest.approx(step_s)
    assert slice_estimate(plan)[1] < 80 * 2**30
