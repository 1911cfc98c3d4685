"""Members of a scaling family: what stays, what grows, and which sizes are refused with what instead."""

import pytest

from moe_bench.errors import RecipeError
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.family import nearest_sizes, scaled_recipe
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Origin, Recipe

LOADER = Loader(root=recipes_root(), rules=())
RECIPES = [LOADER.recipe(path) for path in recipe_paths(LOADER.root)]
CHANGED = {"variant", "reproduces", "differences", "origin", "parallel", "global_batch_size"}


def recipe_named(name: str) -> Recipe:
    return next(recipe for recipe in RECIPES if recipe.name == name)


DEEPSEEK = recipe_named("deepseek_v3/h100_sxm_1024g_bf16")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_twice_the_gpus_of_a_shipped_recipe_are_legal_and_change_nothing_but_replicas(recipe: Recipe) -> None:
    num_gpus = 2 * recipe.parallel.num_gpus
    member = scaled_recipe(recipe, num_gpus, strong=False)
    assert legality_problems(member) == ()
    assert member.model_dump(exclude=CHANGED) == recipe.model_dump(exclude=CHANGED)
    assert member.parallel == recipe.parallel.model_copy(update={"num_gpus": num_gpus})
    assert member.parallel.data == 2 * recipe.parallel.data
    assert member.global_batch_size == 2 * recipe.global_batch_size
    assert member.num_micro_batches == recipe.num_micro_batches
    assert member.origin == Origin(recipe=recipe.name, scaling="weak", row=recipe.reproduces)
    assert member.reproduces is None


def test_strong_scaling_keeps_the_batch_and_divides_the_micro_batches() -> None:
    member = scaled_recipe(DEEPSEEK, 2048, strong=True)
    assert member.global_batch_size == DEEPSEEK.global_batch_size == 16384
    # 16384 sequences / (micro batch 1 x DP 2048 / (TP2 x PP8)) = 128
    assert member.num_micro_batches == 128
    assert member.name == "deepseek_v3/h100_sxm_2048g_bf16_strong_of_1024g"


def test_the_own_size_of_a_recipe_is_the_recipe() -> None:
    assert scaled_recipe(DEEPSEEK, 1024, strong=False) is DEEPSEEK
    assert scaled_recipe(DEEPSEEK, 1024, strong=True) is DEEPSEEK


def test_expert_ranks_do_not_shrink_with_the_job() -> None:
    # EP64 x PP8 need 512 GPUs: a smaller job is refused, not given another EP
    with pytest.raises(RecipeError) as caught:
        scaled_recipe(DEEPSEEK, 64, strong=False)
    assert str(caught.value) == (
        "--num-gpus 64: parallel.expert: ETP1 x EP64 x PP8 = 512 GPUs, num_gpus = 64: expert tensor, "
        "expert and pipeline ranks must tile the job (megatron/core/parallel_state.py:882); "
        "use 512 GPUs, or EP8; nearest legal sizes: 512"
    )


def test_a_batch_that_no_longer_divides_names_the_sizes_around() -> None:
    # DP96 does not divide 16384 sequences; DP64 and DP128 do
    with pytest.raises(RecipeError, match=r"DP96 = 96, global batch 16384.*sizes: 1024 and 2048"):
        scaled_recipe(DEEPSEEK, 1536, strong=True)


@pytest.mark.parametrize("num_gpus", [1, 7, 1000])
def test_gpus_that_hold_no_whole_replica_are_refused(num_gpus: int) -> None:
    with pytest.raises(RecipeError, match="TP2 x PP8 x CP1 = 16 GPUs"):
        scaled_recipe(DEEPSEEK, num_gpus, strong=False)


@pytest.mark.parametrize("strong", [False, True])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_the_nearest_sizes_are_legal_and_sizes_between_them_are_not(recipe: Recipe, strong: bool) -> None:
    wanted = recipe.parallel.num_gpus * 3 // 2 + 1
    sizes = nearest_sizes(recipe, wanted, strong=strong)
    for size in sizes:
        assert legality_problems(scaled_recipe(recipe, size, strong=strong)) == ()
    below, above = sizes[0], sizes[-1]
    assert below <= wanted
    for between in range(below + 1, above, max(1, (above - below) // 20)):
        if between == wanted and recipe.parallel.expert == 1 and not strong:
            continue  # every number of GPUs holds whole replicas
        with pytest.raises(RecipeError):
            scaled_recipe(recipe, between, strong=strong)


def test_changes_become_part_of_name_and_origin() -> None:
    changes = ("dispatch.dispatcher=alltoall", "parallel.expert=32")
    member = scaled_recipe(DEEPSEEK, 512, strong=False, changes=changes)
    assert member.run_name == "h100_sxm_512g_bf16_weak_of_1024g_dispatcher_alltoall_expert_32"
    assert member.origin is not None
    assert member.origin.changes == changes
