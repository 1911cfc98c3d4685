"""The recipe that a dry run builds, and the ranks that it runs."""

from __future__ import annotations

import pytest

from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import find_recipe, recipe_paths, recipes_root
from moe_bench.spec.derive_dryrun import dryrun_plan, ranks_to_run, require_micro_batches
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import Plan

LOADER = Loader(root=recipes_root())
NAMES = [f"{path.parent.name}/{path.stem}" for path in recipe_paths(LOADER.root)]


def recipe_of(name: str) -> Recipe:
    return LOADER.recipe(find_recipe(name, LOADER))


def used(plan: Plan) -> dict[str, str]:
    return {row.field: row.used for row in plan.substitutions}


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_keeps_its_sizes_and_layout(name: str) -> None:
    asked = recipe_of(name)
    plan = dryrun_plan(asked, modified=())
    built = plan.recipe
    assert plan.asked == name
    assert built.model == asked.model
    assert built.tokens_per_step == asked.tokens_per_step
    assert built.num_micro_batches == asked.num_micro_batches
    assert built.recompute == asked.recompute
    kept = asked.parallel.model_copy(update={"context_comm": built.parallel.context_comm})
    assert built.parallel == kept
    family = "quack" if asked.kernels.family == "quack" else "torch_native"
    assert (built.kernels.family, built.dispatch.dispatcher) == (family, "alltoall")


def test_every_substitution_is_a_row_with_its_reason() -> None:
    plan = dryrun_plan(recipe_of("deepseek_v3/h100_sxm_256g_fp8_blockwise_offload"), modified=("seed=1",))
    rows = used(plan)
    assert rows["precision"] == "bf16"
    assert rows["kernels.family"] == "torch_native"
    assert rows["dispatch.dispatcher"] == "alltoall"
    assert rows["offload.optimizer_fraction"] == "0.0"
    assert rows["routing.mode"] == "balanced counts"
    assert all(row.why for row in plan.substitutions)
    assert plan.modified == ("seed=1",)


def test_fusions_stay_where_there_is_a_stand_in() -> None:
    built = dryrun_plan(recipe_of("deepseek_v3"), modified=()).recipe.kernels.fusions
    assert (built.permute, built.router, built.rope, built.activation) == (True, True, True, True)
    assert not built.gradient_accumulation


def test_rings_of_keys_and_values_become_gathers() -> None:
    plan = dryrun_plan(recipe_of("qwen3_235b_a22b/h100_sxm_256g_bf16_seq128k"), modified=())
    assert used(plan)["parallel.context_comm"] == "allgather"


def test_gathered_tokens_stay_gathered() -> None:
    asked = recipe_of("qwen3_30b_a3b/h100_sxm_16g_bf16")
    gathered = asked.dispatch.model_copy(update={"dispatcher": "allgather"})
    plan = dryrun_plan(asked.model_copy(update={"dispatch": gathered}), modified=())
    assert plan.recipe.dispatch.dispatcher == "allgather"
    assert "dispatch.dispatcher" not in used(plan)


@pytest.mark.parametrize(
    ("name", "number", "complaint"),
    [
        ("deepseek_v3/h100_sxm_256g_bf16", 4, None),
        ("deepseek_v3/h100_sxm_256g_bf16", 8, None),
        (
            "deepseek_v3/h100_sxm_256g_bf16",
            1,
            "the interleaved schedule runs groups of 4; use a multiple of 4",
        ),
        ("deepseek_v3/h100_sxm_256g_bf16", 9, "a step has 8; use 1 to 8"),
        ("mixtral_8x22b/h100_sxm_128g_bf16_fsdp", 3, None),
        ("mixtral_8x22b/h100_sxm_128g_bf16_fsdp", 1, "Megatron-FSDP's first and last differ"),
        ("qwen3_30b_a3b/h100_sxm_16g_bf16", 1, None),
        ("qwen3_30b_a3b/h100_sxm_16g_bf16", 0, "use 1 to"),
    ],
)
def test_only_micro_batches_that_show_a_step_are_run(name: str, number: int, complaint: str | None) -> None:
    recipe = dryrun_plan(recipe_of(name), modified=()).recipe
    if complaint is None:
        require_micro_batches(recipe, number)
        return
    with pytest.raises(BadInputError) as refused:
        require_micro_batches(recipe, number)
    assert str(refused.value).startswith(f"--micro-batches {number}: ")
    assert complaint in str(refused.value)


def test_stages_are_run_at_their_first_rank() -> None:
    recipe = recipe_of("deepseek_v3/h100_sxm_1024g_bf16")
    assert ranks_to_run(recipe, rank=None, all_stages=True) == tuple(range(0, 1024, 128))
    assert ranks_to_run(recipe, rank=None, all_stages=False) == (0,)
    assert ranks_to_run(recipe, rank=1023, all_stages=False) == (1023,)


@pytest.mark.parametrize(
    ("rank", "all_stages", "complaint"),
    [
        (1024, False, "--rank 1024: the recipe has ranks 0 to 1023"),
        (-1, False, "--rank -1: the recipe has ranks 0 to 1023"),
        (3, True, "--rank with --all-stages"),
    ],
)
def test_ranks_that_do_not_exist_are_refused(rank: int, all_stages: bool, complaint: str) -> None:
    recipe = recipe_of("deepseek_v3/h100_sxm_1024g_bf16")
    with pytest.raises(BadInputError, match=complaint):
        ranks_to_run(recipe, rank=rank, all_stages=all_stages)
