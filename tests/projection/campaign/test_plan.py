"""The list of measurements: in the order of their value, within the budget, each a command that exists."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.calibration.plan import CalibrationPlan
from moe_bench.projection.campaign.plan import KINDS, CampaignPlan, Sources, campaign_plan
from moe_bench.projection.campaign.predictions import predictions
from moe_bench.projection.campaign.wishes import (
    LAYERS,
    SLICES,
    CalibrateWish,
    LayerWish,
    SliceWish,
    wishes,
)
from moe_bench.results.reach import expert_gemms, reached, slice_rate
from moe_bench.results.sonicmoe import SHAPES
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.layer_case import layer_case_of
from moe_bench.spec.load import Loader
from moe_bench.spec.system import SystemSpec

HOUR_S = 3600.0


@pytest.fixture(scope="module")
def loader() -> Loader:
    return Loader(root=recipes_root())


@pytest.fixture(scope="module")
def system(loader: Loader) -> SystemSpec:
    return loader.system("h100_sxm")


def sources(loader: Loader, *installed: str) -> Sources:
    from moe_bench.cli.calibrate import calibrated_recipes, planned_calibration
    from moe_bench.cli.options import OneRank, ScaleOption, plan_of
    from moe_bench.results.calibration_tasks import OPERATIONS

    def calibration_of(wish: CalibrateWish) -> CalibrationPlan:
        recipes = calibrated_recipes(["qwen3_30b_a3b"], loader, tiny=False)
        only, system = wish.only or OPERATIONS, loader.system("h100_sxm")
        return planned_calibration(recipes, system, loader, only, False, wish.budget_s)

    return Sources(
        slice_of=lambda wish: plan_of(
            wish.recipe,
            scale=ScaleOption.SLICE,
            num_gpus=None,
            changes=list(wish.changes),
            one_rank=OneRank(kernels=wish.kernels),
        ),
        layers_of=lambda wish: (
            [shape.case(scale_down=1) for shape in SHAPES]
            if wish.recipe is None
            else [layer_case_of(loader.recipe(find_recipe(wish.recipe, loader)))]
        ),
        calibration_of=calibration_of,
        installed=lambda module: module in installed,
        has_tests=True,
    )


def planned(
    loader: Loader, system: SystemSpec, *installed: str, budget_s: float = 25 * 60.0, tiny: bool = False
) -> CampaignPlan:
    made = sources(loader, *installed)
    return campaign_plan(system, made, only=None, is_tiny=tiny, budget_s=budget_s)


@pytest.mark.parametrize("installed", [(), ("transformer_engine",), ("transformer_engine", "quack")])
def test_what_is_kept_fits_the_budget_and_uses_it(
    loader: Loader, system: SystemSpec, installed: tuple[str, ...]
) -> None:
    plan = planned(loader, system, *installed)
    assert plan.estimated_s <= 25 * 60
    assert all(plan.estimated_s + one.due_s > 25 * 60 for one in plan.over_budget)
    assert {one.step.key for one in (*plan.steps, *plan.over_budget)} == {
        wish.key for wish in wishes(is_tiny=False)
    }


def test_every_measurement_fits_the_memory_of_the_gpu(loader: Loader, system: SystemSpec) -> None:
    assert system.gpu is not None
    plan = planned(loader, system, "transformer_engine", "quack", budget_s=10 * HOUR_S)
    assert plan.over_budget == ()
    for one in plan.steps:
        assert one.memory_bytes is None or 0 < one.memory_bytes < system.gpu.usable_bytes, one.step.key


def test_what_is_missing_is_named_and_takes_no_time(loader: Loader, system: SystemSpec) -> None:
    plan = planned(loader, system)
    absent = {one.step.key for one in plan.steps if one.absent}
    assert {f"slice {recipe} transformer_engine" for recipe in SLICES} <= absent
    assert all(one.due_s == 0 < one.estimated_s for one in plan.steps if one.absent)
    assert not any(one.absent for one in planned(loader, system, "transformer_engine", "quack").steps)


def test_tests_come_first_and_repeats_last() -> None:
    order = [wish.kind for wish in wishes(is_tiny=False)]
    assert order[:2] == ["tests", "ceilings"]
    repeats = [isinstance(wish.what, SliceWish) and wish.what.repeat > 0 for wish in wishes(is_tiny=False)]
    assert all(before <= after for before, after in pairwise(repeats))
    assert set(order) == set(KINDS)


def test_each_of_the_four_models_is_sliced_and_taken_apart_with_its_peers() -> None:
    for name in ("deepseek_v3", "qwen3_235b_a22b", "qwen3_30b_a3b", "gpt_oss_120b"):
        assert any(recipe.startswith(f"{name}/") for recipe in SLICES)
        assert any(recipe.startswith(f"{name}/") for recipe, _ in LAYERS)
    layers = [wish.what for wish in wishes(is_tiny=False) if isinstance(wish.what, LayerWish)]
    assert sum(layer.has_peers for layer in layers) == 4
    assert sum(layer.recipe is None for layer in layers) == 1
    assert any(layer.is_sweep for layer in layers)
    assert any(layer.held_s == 60.0 for layer in layers)


def test_the_layers_are_those_of_the_expert_parallel_sizes_that_are_compared(loader: Loader) -> None:
    sizes = {
        recipe.split("/")[0]: loader.recipe(find_recipe(recipe, loader)).parallel.expert
        for recipe, _ in LAYERS
    }
    assert sizes == {"deepseek_v3": 64, "qwen3_235b_a22b": 32, "qwen3_30b_a3b": 8, "gpt_oss_120b": 8}


def test_keys_are_unique() -> None:
    keys = [wish.key for wish in wishes(is_tiny=False)]
    assert len(set(keys)) == len(keys)


def test_an_unknown_kind_is_refused(loader: Loader, system: SystemSpec) -> None:
    with pytest.raises(BadInputError, match=r"--only slices: unknown; choose from tests,ceilings,slice"):
        campaign_plan(system, sources(loader), only=("slices",), is_tiny=False, budget_s=HOUR_S)


def commands(plan: CampaignPlan) -> Iterator[tuple[str, ...]]:
    for one in plan.steps:
        if one.step.program == "moe-bench":
            yield one.step.arguments


@pytest.mark.parametrize("tiny", [False, True])
def test_every_command_can_be_typed(loader: Loader, system: SystemSpec, tiny: bool) -> None:
    """Parsed by the verbs themselves, which are not run."""
    import typer

    from moe_bench.cli import app_with

    group = typer.main.get_command(app_with())
    plan = planned(loader, system, "transformer_engine", "quack", budget_s=10 * HOUR_S, tiny=tiny)
    for name, *arguments in commands(plan):
        verb = group.commands[name]  # type: ignore[attr-defined]
        context = verb.make_context(name, [*arguments, "--out", "results"])
        assert context.params["out"] is not None


def test_every_figure_that_is_predicted_is_one_that_is_to_be_reached(
    loader: Loader, system: SystemSpec
) -> None:
    predicted = predictions(system, sources(loader))
    assert set(predicted) <= {one.what for one in reached((), ())}
    assert sum(what.startswith("sonicmoe/") for what in predicted) == 12
    for what, value in predicted.items():
        assert 0 < value < (1e15 if what == slice_rate(what.split(":")[0]) else 2)


def test_a_dense_product_is_predicted_below_the_peak_of_the_gpu(loader: Loader, system: SystemSpec) -> None:
    """So that products of experts, which are smaller, are predicted below the large one."""
    predicted = predictions(system, sources(loader))
    for recipe, _ in LAYERS:
        assert predicted[expert_gemms(recipe.split("/")[0])] < 1
