"""One rank of a recipe: layers of its stage, sizes that stay, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.analysis.memory import fits
from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import find_recipe, recipe_paths, recipes_root
from moe_bench.spec.derive_slice import slice_plan, tiny_slice_plan
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import Plan

LOADER = Loader(root=recipes_root())
HOST = LOADER.system("cpu_host")
PATHS = recipe_paths(recipes_root())


def recipe_of(name: str) -> Recipe:
    return LOADER.recipe(find_recipe(name, LOADER))


def slice_of(recipe: Recipe) -> Plan:
    return slice_plan(recipe, fits=lambda _: True, modified=())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_slice_of_every_recipe_is_legal_and_keeps_the_work_of_a_rank(path: Path) -> None:
    asked = LOADER.recipe(path)
    plan = slice_plan(asked, fits=fits, modified=())
    cut, parallel = plan.recipe, asked.parallel
    assert list(legality_problems(cut)) == []
    assert asked.model.moe is not None
    assert cut.model.moe is not None
    assert cut.model.num_layers - cut.model.num_dense_layers >= 2
    for name in ("hidden_size", "vocab_size", "attention", "dense_ffn_hidden_size"):
        assert getattr(cut.model, name) == getattr(asked.model, name)
    for name in ("num_experts", "top_k", "expert_ffn_hidden_size", "shared_expert_ffn_hidden_size"):
        assert getattr(cut.model.moe, name) == getattr(asked.model.moe, name)
    for name in ("tensor", "context", "expert", "expert_tensor", "data", "expert_data"):
        assert getattr(cut.parallel, name) == getattr(parallel, name)
    assert cut.parallel.num_gpus * parallel.pipeline == parallel.num_gpus
    assert cut.num_micro_batches == asked.num_micro_batches
    assert (cut.system, cut.recompute.granularity != "none") == (
        asked.system,
        asked.recompute.granularity == "full" or bool(set(asked.recompute.modules) - {"mlp"}),
    )
    assert (plan.is_slice, plan.num_ranks) == (True, 1)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_tiny_slice_of_every_recipe_is_legal(path: Path) -> None:
    plan = tiny_slice_plan(LOADER.recipe(path), host=HOST, modified=())
    assert list(legality_problems(plan.recipe)) == []
    assert plan.recipe.system.gpu is None
    assert plan.num_ranks == 1


def test_the_layers_are_those_of_the_stage_with_the_most_experts() -> None:
    asked = recipe_of("deepseek_v3/h100_sxm_256g_bf16")
    # Et|(tt|)*30L over 4 ranks: 15 layers with the embedding, of which 3 dense, then 16, 16, and 14
    assert (asked.parallel.layout, asked.parallel.pipeline) == ("Et|(tt|)*30L", 4)
    cut = slice_of(asked).recipe
    assert (cut.model.num_layers, cut.model.num_dense_layers, cut.num_mtp_layers) == (16, 0, 0)


def test_layers_that_do_not_fit_are_left_out_and_the_count_is_a_row() -> None:
    asked = recipe_of("deepseek_v3/h100_sxm_256g_bf16")
    plan = slice_plan(asked, fits=lambda cut: cut.model.num_layers <= 5, modified=())
    rows = {row.field: (row.asked, row.used) for row in plan.substitutions}
    assert rows["model.num_layers"] == ("61", "5")
    assert rows["ranks"] == ("256", "rank 0 of 64")


def test_two_expert_layers_are_the_least() -> None:
    asked = recipe_of("deepseek_v3/h100_sxm_256g_bf16")
    with pytest.raises(BadInputError, match="not even 2 expert layers"):
        slice_plan(asked, fits=lambda _: False, modified=())


def test_a_model_without_experts_has_no_slice() -> None:
    asked = recipe_of("qwen3_30b_a3b")
    dense = asked.model.model_copy(update={"moe": None})
    with pytest.raises(BadInputError, match="has none"):
        slice_of(asked.model_copy(update={"model": dense}))


def test_every_departure_is_a_row() -> None:
    asked = recipe_of("deepseek_v3/h100_sxm_256g_bf16")
    fields = {row.field for row in slice_of(asked).substitutions}
    assert {
        "kernels.family",
        "dispatch.dispatcher",
        "parallel.pipeline",
        "parallel.num_gpus",
        "overlap.grad_reduce",
    } <= fields
