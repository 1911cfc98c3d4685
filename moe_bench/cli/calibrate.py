"""The verb that measures what single operations achieve on this machine's GPU: calibrate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import RUN, app
from moe_bench.cli.gpu import (
    INTERRUPTED,
    PlannedSystemOption,
    ResumeOption,
    gpu_to_measure_on,
    journal_to_resume,
    system_for_plan,
    system_or_default,
)
from moe_bench.cli.options import (
    JsonOption,
    ResultsRootOption,
    make_console,
    make_loader,
    print_view,
    results_root,
)
from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import data_root, find_recipe, recipe_paths

if TYPE_CHECKING:
    from collections.abc import Callable

    from moe_bench.projection.calibration.plan import CalibrationPlan
    from moe_bench.results.calibration import CalibrationProvenance
    from moe_bench.results.calibration_journal import Journal
    from moe_bench.results.calibration_tasks import OperationName
    from moe_bench.spec.load import Loader
    from moe_bench.spec.recipe import Recipe
    from moe_bench.spec.system import SystemSpec

TINY_MODELS = ("deepseek_v3", "gpt_oss_20b", "qwen3_30b_a3b")
"""Whose toys have every kind of operation: latent, windowed and grouped attention, both ways of routing."""


@app.command(rich_help_panel=RUN)
def calibrate(
    recipes: Annotated[
        list[str] | None, typer.Argument(help="Recipes whose shapes are measured; default: all shipped.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Time toy shapes, on any machine; no projection reads them.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            "--only", metavar="OPERATION,...", help="Operations to time, such as dense_gemm,launch."
        ),
    ] = None,
    resume: ResumeOption = False,
    budget_seconds: Annotated[
        float | None,
        typer.Option("--budget-seconds", min=1, help="Time the most valuable that fit into so many seconds."),
    ] = None,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Print every measurement with its seconds and memory, and measure nothing."
        ),
    ] = False,
    system: PlannedSystemOption = None,
    out: ResultsRootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure what single operations achieve on this GPU; the projection reads the file."""
    operations = _operations(only)
    loader = make_loader()
    found = calibrated_recipes(recipes, loader, tiny=tiny)
    if plan:
        from moe_bench.report.calibration_view import plan_json, plan_view

        planned = planned_calibration(
            found, system_for_plan(system, loader), loader, operations, tiny, budget_seconds
        )
        print_view(plan_view(planned), plan_json(planned), as_json)
        return
    gpu = gpu_to_measure_on("calibrate", system, tiny=tiny, toys="the command")
    here = system_or_default(gpu, loader)
    planned = planned_calibration(found, here, loader, operations, tiny, budget_seconds)
    toys_on = here if gpu is not None else loader.system("cpu_host")
    _measure(
        planned,
        toys_on,
        loader,
        out or results_root(),
        resume=resume,
        budget_s=budget_seconds,
        as_json=as_json,
    )


def _operations(only: str | None) -> tuple[OperationName, ...]:
    from moe_bench.results.calibration_tasks import OPERATIONS

    if only is None:
        return OPERATIONS
    named = [part.strip() for part in only.split(",") if part.strip()]
    unknown = [name for name in named if name not in OPERATIONS]
    if unknown or not named:
        raise BadInputError(
            f"--only {only}: {', '.join(unknown) or 'nothing'}: unknown operation; choose from "
            f"{','.join(OPERATIONS)}"
        )
    return tuple(name for name in OPERATIONS if name in named)


def calibrated_recipes(names: list[str] | None, loader: Loader, *, tiny: bool) -> list[Recipe]:
    from moe_bench.spec.derive_calibration import calibration_toy

    if names or tiny:
        paths = tuple(find_recipe(name, loader) for name in names or TINY_MODELS)
    else:
        paths = recipe_paths(loader.root)
    found = [loader.recipe(path) for path in paths]
    host = loader.system("cpu_host")
    return [calibration_toy(recipe, host=host) for recipe in found] if tiny else found


def planned_calibration(
    recipes: list[Recipe],
    system: SystemSpec,
    loader: Loader,
    operations: tuple[OperationName, ...],
    tiny: bool,
    budget_s: float | None,
) -> CalibrationPlan:
    from importlib.util import find_spec

    from moe_bench.projection.calibration.plan import calibration_plan

    return calibration_plan(
        recipes,
        system,
        launching=_launching_toy(loader, system, num_layers=2),
        only=operations,
        installed=lambda package: find_spec(package) is not None,
        is_tiny=tiny,
        budget_s=budget_s,
    )


def _launching_toy(loader: Loader, system: SystemSpec, *, num_layers: int) -> Recipe:
    from moe_bench.spec.derive_calibration import LAUNCHING_MODEL, launching_toy

    recipe = loader.recipe(find_recipe(LAUNCHING_MODEL, loader))
    host = loader.system("cpu_host")
    return launching_toy(recipe, num_layers=num_layers, host=host, system=system)


def _measure(
    plan: CalibrationPlan,
    system: SystemSpec,
    loader: Loader,
    root: Path,
    *,
    resume: bool,
    budget_s: float | None,
    as_json: bool,
) -> None:
    """Run the plan, or the rest of it, write the file and print it."""
    from moe_bench.harness.start import quiet_imports
    from moe_bench.projection.evidence.calibrated_constants import constants_for
    from moe_bench.report.calibration_view import calibration_json, calibration_progress, calibration_view
    from moe_bench.results.calibration import read_calibration

    with quiet_imports():
        from moe_bench.harness.calibrate import sweep as harness
    sweep = harness.sweep_here(
        lambda num_layers: _launching_toy(loader, system, num_layers=num_layers), is_tiny=plan.is_tiny
    )
    journal = _journal(root, harness.provenance_here, resume=resume, is_tiny=plan.is_tiny)
    tasks = [one.task for one in plan.tasks]
    num_done = sum(task in journal.done for task in tasks)
    try:
        with calibration_progress(len(tasks), num_done, make_console(stderr=True)) as (on_task, on_entry):
            num_left = harness.run_tasks(
                sweep, tasks, journal, budget_s=budget_s, on_task=on_task, on_entry=on_entry
            )
    except KeyboardInterrupt:
        num_done = sum(task in journal.done for task in tasks)
        typer.echo(f"stopped after {num_done} of {len(tasks)}; go on with --resume", err=True)
        raise typer.Exit(INTERRUPTED) from None
    path = journal.finish(end_sm_clock_hz=sweep.sm_clock_hz())
    calibration = read_calibration(path)
    view = calibration_view(calibration, constants_for(plan.system, [calibration], with_shapes=False))
    print_view(view, calibration_json(calibration, str(path)), as_json)
    if num_left:
        typer.echo(f"the budget ended before {num_left} of {len(tasks)} measurements", err=True)
    if not as_json:
        typer.echo(f"written to {path}")


def _journal(
    root: Path, provenance_here: Callable[..., CalibrationProvenance], *, resume: bool, is_tiny: bool
) -> Journal:
    """A new journal, or with `resume` the newest one of this GPU that is not finished."""
    from moe_bench.launch.environment import current_environment
    from moe_bench.results.calibration_journal import resume_journal, start_journal, unfinished_journals

    here = provenance_here(
        command=tuple(sys.argv), environment=current_environment(), source_root=data_root()
    )
    unfinished = unfinished_journals(root, here.gpu.name)
    begun = journal_to_resume(
        unfinished, resume=resume, what="calibration", gpu_name=here.gpu.name, root=root
    )
    if begun is not None:
        return resume_journal(begun, here, is_tiny=is_tiny)
    return start_journal(root, here, is_tiny=is_tiny)
