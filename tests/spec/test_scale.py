"""A derived recipe is legal, keeps the structure, and lists every field in which it departs."""

from pathlib import Path

import pytest

from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import Plan, full_plan, smoke_plan

LOADER = Loader(root=recipes_root())
HOST = LOADER.system("cpu_host")
PATHS = recipe_paths(LOADER.root)


def smoke(recipe: Recipe) -> Plan:
    return smoke_plan(recipe, host=HOST, modified=())


@pytest.fixture(params=PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def recipe(request: pytest.FixtureRequest) -> Recipe:
    path: Path = request.param
    return LOADER.recipe(path)


def test_a_smoke_recipe_is_legal_and_small(recipe: Recipe) -> None:
    toy = smoke(recipe).recipe
    assert legality_problems(toy) == ()
    assert toy.parallel.num_gpus <= 8
    assert toy.num_micro_batches == 4


def test_a_smoke_recipe_keeps_the_structure(recipe: Recipe) -> None:
    toy = smoke(recipe).recipe
    for size in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor"):
        assert (getattr(toy.parallel, size) > 1) == (getattr(recipe.parallel, size) > 1), size
    assert toy.parallel.data_sharding == recipe.parallel.data_sharding
    assert toy.model.attention.kind == recipe.model.attention.kind
    assert toy.num_mtp_layers == recipe.num_mtp_layers
    kept = (
        "gated_linear_unit", "add_bias_linear", "softmax_type", "qk_layernorm", "add_qkv_bias", "rope_type",
        "moe_router_score_function", "moe_router_pre_softmax", "moe_router_enable_expert_bias",
        "moe_router_load_balancing_type", "moe_router_topk_scaling_factor", "glu_linear_offset",
    )  # fmt: skip
    asked, used = megatron_arguments(recipe).transformer, megatron_arguments(toy).transformer
    assert {name: asked.get(name) for name in kept} == {name: used.get(name) for name in kept}
    assert (asked.get("window_size") is None) == (used.get("window_size") is None)
    assert (asked["moe_shared_expert_intermediate_size"] is None) == (
        used["moe_shared_expert_intermediate_size"] is None
    )


def test_every_departure_is_a_row(recipe: Recipe) -> None:
    plan = smoke(recipe)
    listed = {row.field for row in plan.substitutions}
    for name in Recipe.model_fields:
        if name in ("reproduces", "differences", "variant"):
            continue
        differs = getattr(recipe, name) != getattr(plan.recipe, name)
        assert differs == any(field.partition(".")[0] == name for field in listed), name
    assert all(row.asked != row.used and row.why for row in plan.substitutions)


def test_a_plan_survives_its_record(recipe: Recipe) -> None:
    plan = smoke(recipe)
    assert Plan.model_validate_json(plan.model_dump_json()) == plan


def test_steps_that_the_user_sets_stay() -> None:
    path = LOADER.root / "deepseek_v3" / "h100_sxm_256g_bf16.yaml"
    change = "steps.num_timed=200"
    plan = smoke_plan(LOADER.recipe(path, changes=(change,)), host=HOST, modified=(change,))
    assert plan.recipe.steps.num_timed == 200
    assert not [row for row in plan.substitutions if row.field.startswith("steps.")]


def test_at_full_scale_nothing_is_substituted() -> None:
    recipe = LOADER.recipe(LOADER.root / "deepseek_v3" / "h100_sxm_256g_bf16.yaml")
    plan = full_plan(recipe, modified=())
    assert plan.recipe == recipe
    assert plan.substitutions == ()
