"""The verb that says how fast a recipe would be, whether it fits, and what limits it: project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import PREDICT, app
from moe_bench.cli.files import any_file_to_write, drawing_to_write
from moe_bench.cli.options import (
    JsonOption,
    RecipeArgument,
    SetOption,
    StrongOption,
    make_loader,
    print_view,
    require_unquantised,
    results_root,
    whole_numbers,
)
from moe_bench.errors import BadInputError, RecipeError
from moe_bench.spec.catalogue import data_root, find_recipe

if TYPE_CHECKING:
    from rich.console import RenderableType

    from moe_bench.projection.cost import TrainingCost
    from moe_bench.projection.forecast import Basis, Forecast
    from moe_bench.projection.nearest import NearRow
    from moe_bench.projection.scaleout import ScaleOut
    from moe_bench.projection.step import Projection
    from moe_bench.spec.recipe import Recipe


SizesOption = Annotated[
    str | None,
    typer.Option("--num-gpus", metavar="N,N,...", help="Also project these sizes of the scaling family."),
]
WhatIfOption = Annotated[
    list[str] | None,
    typer.Option(
        "--what-if",
        metavar="KEY=VALUE",
        help="Compare with this change: a key as in --set, constants.NAME or schedule; repeatable.",
    ),
]
LoadOption = Annotated[
    str | None,
    typer.Option(
        "--load",
        help="balanced, random, power_law:ALPHA, or a JSON file of tokens per layer and expert; "
        "default: what routing.mode leads to.",
    ),
]
TokensOption = Annotated[
    float | None,
    typer.Option(
        "--train-tokens",
        min=1,
        max=1e18,
        help="Also give time, GPU-hours and energy to train on so many tokens, such as 15e12.",
    ),
]
PriceOption = Annotated[
    float | None,
    typer.Option("--price-per-gpu-hour", min=0, help="With --train-tokens: also give the price."),
]
TraceOption = Annotated[
    Path | None,
    typer.Option(
        "--trace",
        callback=any_file_to_write,
        help="Write the pipeline for ui.perfetto.dev (JSON).",
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option("--plot", callback=drawing_to_write, help="Draw where the step goes (SVG)."),
]
PipelineOption = Annotated[
    Path | None,
    typer.Option("--plot-pipeline", callback=drawing_to_write, help="Draw which rank computes when (SVG)."),
]

UncalibratedOption = Annotated[
    bool,
    typer.Option("--uncalibrated", help="Ignore results/calibration, for the same number on every machine."),
]
TablesOption = Annotated[
    bool, typer.Option("--tables", help="Also use the tables of aiconfigurator-core (moe_bench[prior]).")
]


@app.command(rich_help_panel=PREDICT)
def project(
    recipe: RecipeArgument,
    num_gpus: SizesOption = None,
    strong: StrongOption = False,
    what_if: WhatIfOption = None,
    load: LoadOption = None,
    train_tokens: TokensOption = None,
    price: PriceOption = None,
    trace: TraceOption = None,
    plot: PlotOption = None,
    plot_pipeline: PipelineOption = None,
    uncalibrated: UncalibratedOption = False,
    tables: TablesOption = False,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Project step time, memory and scaling of a recipe, beside the nearest published rows."""
    from moe_bench.projection.forecast import forecast
    from moe_bench.report import project_json, project_view

    if price is not None and train_tokens is None:
        raise BadInputError("--price-per-gpu-hour prices a training; add --train-tokens N")
    if strong and num_gpus is None:
        raise BadInputError("--strong says how --num-gpus scales; add --num-gpus N,N")
    modified = tuple(changes or ())
    asked = _recipe(recipe, modified)
    basis = _basis(asked, uncalibrated=uncalibrated, tables=tables)
    made = forecast(asked, basis=basis, load=load)
    near = _near(asked)
    parts: list[RenderableType] = [project_view.forecast_view(made, near, modified=modified)]
    data = {
        **project_json.forecast_json(made),
        "modified": modified,
        "nearest": project_json.near_json(near),
    }
    if what_if:
        other = _other(recipe, modified, what_if, basis, load)
        parts.append(project_view.what_if_view(made, other, what_if))
        data["what_if"] = {"changes": what_if, **project_json.forecast_json(other)}
    sized = [made.projection]
    if num_gpus is not None:
        sizes = whole_numbers(num_gpus, option="--num-gpus", example="256,1024,16384")
        curve = _curve(asked, sizes, strong, modified, basis, load)
        sized = [point.projection for point in curve.points]
        parts.append(project_view.scale_view(curve))
        data["scaling"] = project_json.scale_json(curve)
    if train_tokens is not None:
        costs = _costs(sized, round(train_tokens))
        parts.append(project_view.cost_view(costs, made, price_per_gpu_hour=price))
        data["training"] = project_json.cost_json(costs, price_per_gpu_hour=price)
    _write_files(made, modified, trace=trace, plot=plot, plot_pipeline=plot_pipeline)
    _print(parts, data, as_json)


def _costs(sized: Sequence[Projection], num_tokens: int) -> tuple[TrainingCost, ...]:
    from moe_bench.projection.cost import training_cost

    return tuple(training_cost(one, num_tokens=num_tokens) for one in sized)


def _curve(
    recipe: Recipe,
    sizes: tuple[int, ...],
    strong: bool,
    changes: tuple[str, ...],
    basis: Basis,
    load: str | None,
) -> ScaleOut:
    from moe_bench.projection.scaleout import scale_out

    return scale_out(recipe, sizes, strong=strong, changes=changes, basis=basis, load=load)


def _basis(recipe: Recipe, *, uncalibrated: bool, tables: bool) -> Basis:
    """Laws and fitted constants, with what was measured here of the recipe's GPU."""
    from moe_bench.projection.evidence.calibrated_shapes import read_calibrations
    from moe_bench.projection.forecast import Basis

    gpu = recipe.system.gpu
    own = () if uncalibrated or gpu is None else read_calibrations(gpu, results_root())
    return Basis(calibrations=own, uses_tables=tables).calibrated(recipe.system)


def _recipe(name: str, changes: tuple[str, ...]) -> Recipe:
    loader = make_loader()
    recipe = loader.recipe(find_recipe(name, loader), changes=changes)
    require_unquantised(recipe)
    return recipe


def _near(recipe: Recipe) -> tuple[NearRow, ...]:
    """Under the shipped constants: those rows did not run on the machine that was calibrated."""
    from moe_bench.projection.nearest import nearest_rows
    from moe_bench.projection.rows.inference import load_catalogue

    root = data_root()
    catalogue = load_catalogue(root / "recipes")
    return nearest_rows(recipe, root / "results" / "published", catalogue)


def _other(name: str, changes: tuple[str, ...], asked: list[str], basis: Basis, load: str | None) -> Forecast:
    """The recipe with what is asked to be otherwise on top of `--set`."""
    from moe_bench.projection.forecast import forecast
    from moe_bench.projection.whatif import what_if

    split = what_if(asked, basis.constants)
    try:
        recipe = _recipe(name, (*changes, *split.recipe_changes))
    except RecipeError as error:
        # the loader calls every change `--set`; these were typed behind another option
        own = {f"--set {change}": f"--what-if {change}" for change in split.recipe_changes}
        raise RecipeError(
            tuple(replace(one, file=own.get(one.file, one.file)) for one in error.mistakes)
        ) from error
    return forecast(
        recipe, basis=replace(basis, constants=split.constants), load=load, schedule=split.schedule
    )


def _write_files(
    made: Forecast,
    modified: tuple[str, ...],
    *,
    trace: Path | None,
    plot: Path | None,
    plot_pipeline: Path | None,
) -> None:
    timeline = made.projection.timeline
    if timeline is None and (trace is not None or plot_pipeline is not None):
        raise BadInputError(f"{made.recipe.name} has no pipeline to draw; choose one with PP above 1")
    if trace is not None and timeline is not None:
        from moe_bench.projection.schedule.trace import write_trace

        write_trace(timeline, trace, name=f"{made.recipe.name}, projected")
    if plot is not None or plot_pipeline is not None:
        from moe_bench.report.html.chart_file import write_chart
        from moe_bench.report.html.pipeline_picture import pipeline_picture
        from moe_bench.report.html.waterfall_chart import waterfall_chart

        subject = made.recipe.name + (" (modified)" if modified else "")
        if plot is not None:
            write_chart(waterfall_chart("waterfall", made), plot, subject=subject)
        if plot_pipeline is not None and timeline is not None:
            write_chart(pipeline_picture("pipeline", timeline), plot_pipeline, subject=subject)


def _print(parts: list[RenderableType], data: dict[str, object], as_json: bool) -> None:
    from rich.console import Group
    from rich.text import Text

    spaced = [piece for part in parts for piece in (part, Text())][:-1]
    print_view(Group(*spaced), data, as_json)
