"""What is planned to be measured: every shape of a recipe is found again, the most valuable come first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.calibration.plan import CONSTANT, GRID, CalibrationPlan, calibration_plan
from moe_bench.projection.calibration.shapes import recipe_shapes
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.evidence.calibrated_shapes import kind_of, operations_of, sizes_of
from moe_bench.projection.step import project
from moe_bench.projection.work.lowering import lower
from moe_bench.projection.work.operations import AttentionCore, Gemm, MemoryBound, Number, Part
from moe_bench.results.calibration import Task
from moe_bench.results.calibration_tasks import OPERATIONS, Implementation
from moe_bench.spec.catalogue import find_recipe, recipe_paths, recipes_root
from moe_bench.spec.derive_calibration import launching_toy
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from tests.projection.evidence.test_calibrated_shapes import calibration

LOADER = Loader(root=recipes_root(), rules=())
SYSTEM = LOADER.system("h100_sxm")
RECIPES = [LOADER.recipe(path) for path in recipe_paths(recipes_root())]
QWEN = LOADER.recipe(find_recipe("qwen3_30b_a3b", LOADER))
TOY = launching_toy(QWEN, num_layers=2, host=LOADER.system("cpu_host"), system=SYSTEM)
MEASURED_PARTS = (Part.PERMUTATION, Part.ROUTER, Part.NORMS)


def planned(
    *recipes: Recipe, installed: Callable[[str], bool] = lambda name: False, **options: Any
) -> CalibrationPlan:
    return calibration_plan(
        recipes or (QWEN,), SYSTEM, launching=TOY, installed=installed, **({"only": OPERATIONS} | options)
    )


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_every_operation_of_a_recipe_is_found_in_what_is_measured_for_it(recipe: Recipe) -> None:
    found = {
        (kind_of(one), sizes_of(one))
        for what, dtype in recipe_shapes(recipe, Efficiency(SYSTEM))
        for one in operations_of(Task(what=what, dtype=dtype, implementation="any"))
    }
    kinds = {kind for kind, _ in found}
    for work in lower(recipe).kinds.values():
        for operation in work.operations:
            if isinstance(operation, Gemm) and operation.number is Number.BF16:
                assert kind_of(operation) in kinds
                assert _near(operation, found) < 0.02
            if isinstance(operation, AttentionCore):
                assert _near(operation, found) < 0.02
            if isinstance(operation, MemoryBound) and operation.part in MEASURED_PARTS:
                assert kind_of(operation) in kinds


def _near(operation: Gemm | AttentionCore, found: set[tuple[tuple[str, ...], tuple[float, ...]]]) -> float:
    """Largest relative difference of sizes to the nearest measured shape of the kind; rows are rounded."""
    own = sizes_of(operation)
    return min(
        max(abs(one / other - 1) if one >= 64 else 0.0 for one, other in zip(own, sizes, strict=True))
        for kind, sizes in found
        if kind == kind_of(operation)
    )


def test_shares_of_time_sum_to_one_over_a_recipe() -> None:
    assert sum(recipe_shapes(QWEN, Efficiency(SYSTEM)).values()) == pytest.approx(1)


def test_constants_come_first_then_shapes_by_time_then_the_grid() -> None:
    tasks = planned(*RECIPES).tasks
    ranks = [0 if one.origin == CONSTANT else 2 if one.origin == GRID else 1 for one in tasks]
    assert ranks == sorted(ranks)
    shares = [one.time_fraction for one in tasks if one.origin not in (CONSTANT, GRID)]
    assert shares == sorted(shares, reverse=True)
    assert len({one.task for one in tasks}) == len(tasks)


def test_all_recipes_are_measured_in_minutes() -> None:
    plan = planned(*RECIPES)
    assert plan.estimated_s < 15 * 60
    assert plan.estimated_s == pytest.approx(sum(one.estimated_s for one in plan.tasks))
    assert {one.task.what.operation for one in plan.tasks} == set(OPERATIONS)


def test_a_budget_keeps_the_most_valuable_and_names_the_rest() -> None:
    whole = planned()
    plan = planned(budget_s=150.0)
    assert plan.estimated_s <= 150.0
    assert len(plan.tasks) + len(plan.over_budget) == len(whole.tasks)
    assert plan.tasks[0] == whole.tasks[0]
    with pytest.raises(BadInputError, match="larger budget"):
        planned(only=("sustained",), budget_s=1.0)


def test_only_what_is_named_is_planned() -> None:
    assert {one.task.what.operation for one in planned(only=("copy", "router")).tasks} == {"copy", "router"}


def test_what_is_not_installed_is_planned_to_be_named_and_takes_no_time() -> None:
    absent = [one for one in planned().tasks if Implementation(one.task.implementation).package]
    assert absent
    assert {one.estimated_s for one in absent} == {0.0}
    assert planned(installed=lambda name: True).estimated_s > planned().estimated_s


def test_low_precision_is_measured_where_a_recipe_asks_for_it() -> None:
    fp8 = QWEN.model_copy(update={"precision": "fp8_rowwise"})
    assert "fp8_e4m3" in {one.task.dtype for one in planned(fp8).tasks}
    assert "fp8_e4m3" not in {one.task.dtype for one in planned().tasks}
    assert not any(
        one.task.dtype == "fp8_e4m3" and getattr(one.task.what, "accumulates_fp32", False)
        for one in planned(fp8).tasks
    )


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "deepseek_v3", "gpt_oss_120b"])
def test_a_gpu_that_runs_at_the_rates_of_the_law_is_projected_as_the_law_projects_it(name: str) -> None:
    recipe = LOADER.recipe(find_recipe(name, LOADER))
    law = Efficiency(SYSTEM)
    times_s = [
        (one.task, law.law_s(operation))
        for one in planned(recipe).tasks
        for operation in operations_of(one.task)
        if not isinstance(operation, Gemm) or operation.number is Number.BF16
    ]
    efficiency = Efficiency(SYSTEM, [calibration(*(_measured(task, time_s) for task, time_s in times_s))])
    assert project(recipe, efficiency=efficiency).step_s == pytest.approx(project(recipe).step_s, rel=1e-9)
    unanswered = {one.kind for one in efficiency.unanswered if recipe.precision == "bf16"}
    in_memory = tuple(f"memory, {part}" for part in MEASURED_PARTS)
    assert not any(
        kind.startswith(("attention", "dense product", "grouped product", *in_memory)) for kind in unanswered
    )


def _measured(task: Task, time_s: float) -> dict[str, Any]:
    return {**task.model_dump(), "cold_l2": True, "samples_s": (time_s,)}
