"""Recipes on one node: what stays, what is cut, and what does not fit."""

import pytest

from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.derive_node import node_plan
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

LOADER = Loader(root=recipes_root())
PATHS = recipe_paths(LOADER.root)


@pytest.fixture(params=PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return LOADER.recipe(request.param)


def test_a_node_keeps_widths_and_experts_per_rank() -> None:
    recipe = LOADER.recipe(LOADER.root / "deepseek_v3" / "h100_sxm_256g_bf16.yaml")
    plan = node_plan(recipe, num_gpus=8, fits=lambda cut: cut.model.num_layers <= 5, modified=())
    used = plan.recipe
    assert used.model.num_layers == 5
    assert used.model.hidden_size == recipe.model.hidden_size
    assert recipe.model.moe is not None
    assert used.model.moe is not None
    # 256 experts over EP64 are 4 per rank; 8 GPUs hold 32
    assert (used.parallel.expert, used.model.moe.num_experts) == (8, 32)
    assert legality_problems(used) == ()
    assert {"model.num_layers", "model.moe.num_experts", "parallel.num_gpus"} <= {
        row.field for row in plan.substitutions
    }


def test_a_node_that_cannot_hold_two_expert_layers_is_refused() -> None:
    recipe = LOADER.recipe(LOADER.root / "deepseek_v3" / "h100_sxm_256g_bf16.yaml")
    with pytest.raises(BadInputError, match="not even 5 layers fit 1 GPUs"):
        node_plan(recipe, num_gpus=1, fits=lambda cut: False, modified=())


@pytest.mark.parametrize("num_gpus", [4, 8, 32])
def test_a_recipe_on_a_node_is_legal_or_says_what_it_needs(recipe: Recipe, num_gpus: int) -> None:
    unit = recipe.parallel.tensor * recipe.parallel.context
    if num_gpus % unit:
        with pytest.raises(
            BadInputError, match=f"needs TP{recipe.parallel.tensor} x CP{recipe.parallel.context}"
        ):
            node_plan(recipe, num_gpus=num_gpus, fits=lambda cut: True, modified=())
    else:
        plan = node_plan(recipe, num_gpus=num_gpus, fits=lambda cut: True, modified=())
        assert legality_problems(plan.recipe) == ()
