"""The verb that shows many results at once: report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench import __version__
from moe_bench.cli.app import READ, app
from moe_bench.cli.files import any_file_to_write, picture_to_write
from moe_bench.cli.options import (
    JsonOption,
    TableFormat,
    make_loader,
    print_view,
    record_places,
    require_one_output,
    results_root,
)
from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import data_root, recipe_model_keys

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import RenderableType

    from moe_bench.launch.jobs import JobReport
    from moe_bench.report.scaling import MissingPoint, ScalingPoint
    from moe_bench.results.parity import Parity
    from moe_bench.results.summary import RunSummary

PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        callback=picture_to_write,
        help="With --scaling: also draw the curves (.png, .svg, .pdf).",
    ),
]
PageOption = Annotated[
    Path | None,
    typer.Option(
        "--html", callback=any_file_to_write, help="Write one self-contained page instead of a table."
    ),
]


@app.command(rich_help_panel=READ)
def report(
    results: Annotated[
        list[Path] | None,
        typer.Argument(help="Records, folders of them, with --html runs of `train`; default: results/."),
    ] = None,
    scaling: Annotated[
        bool,
        typer.Option("--scaling", help="Print weak and strong efficiency, of results and published rows."),
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="With --scaling: only this model, by folder or printed name."),
    ] = None,
    projected: Annotated[
        bool,
        typer.Option("--projected", help="With --scaling: also print projected curves."),
    ] = False,
    layers: Annotated[
        bool, typer.Option("--layers", help="Print MoE layers that `layer` measured, with their peers.")
    ] = False,
    plot: PlotOption = None,
    html: PageOption = None,
    recipes: Annotated[
        list[str] | None,
        typer.Option("--recipe", help="With --html: add a card for this recipe; repeatable."),
    ] = None,
    table_format: Annotated[
        TableFormat, typer.Option("--format", help="How to print the table.")
    ] = TableFormat.TERMINAL,
    as_json: JsonOption = False,
) -> None:
    """Show results as a table, scaling curves or a page: step time, tokens/s/GPU, TFLOPs/GPU, memory."""
    if not scaling and (model is not None or plot is not None or projected):
        raise BadInputError("--model, --plot and --projected go with --scaling; add it, or drop them")
    require_one_output(layers=layers, html=html, scaling=scaling)
    form = None if table_format is TableFormat.TERMINAL else table_format
    require_one_output(json=as_json, format=form, html=html)
    require_one_output(layers=layers, format=form)
    if html is None and recipes is not None:
        raise BadInputError("--recipe goes with --html; add it, or drop --recipe")
    places = record_places(results)
    if html is None:
        _require_records(places)
    if layers:
        _print_layers(places, as_json)
    elif html is not None:
        _write_page(html, places, recipes)
    elif scaling:
        _print_scaling(places, model, projected, plot, table_format, as_json)
    else:
        from moe_bench.report.frame import frame_view, records_frame

        runs = _runs(places)
        frame = records_frame(runs, _parities(places, {run.plan.recipe.model.key for run in runs}))
        _print_frame(frame, lambda: frame_view(frame), table_format, as_json)


def _require_records(places: tuple[Path, ...]) -> None:
    """Raise BadInputError for a training run, which is nothing of a table."""
    from moe_bench.results.training_run import is_run

    for place in filter(is_run, places):
        raise BadInputError(f"{place}: a run of `train`; draw it with --html, or read `moe-bench health`")


def _print_layers(places: tuple[Path, ...], as_json: bool) -> None:
    """Every layer's rates and marks, then what other engines took for the same work."""
    from rich.console import Group

    from moe_bench.report.layer_peers_view import layer_peers_view
    from moe_bench.report.layer_view import layer_json, suite_view
    from moe_bench.results.layer_record import layer_records

    records = [record for place in places for record in layer_records(place)]
    if not records and not as_json:
        raise BadInputError(
            f"{', '.join(map(str, places)) or 'results'}: no layer was measured; moe-bench layer does that"
        )
    peers = [layer_peers_view(record.peers) for record in records if record.peers is not None]
    # predictions stand beside a measurement when it is made; here are measurements alone
    print_view(Group(suite_view(records), *peers), [layer_json(one, {}, None) for one in records], as_json)


def _runs(places: tuple[Path, ...]) -> tuple[RunSummary, ...]:
    from moe_bench.cli.listening import listening
    from moe_bench.results.reading import read_summaries

    with listening() as listener:
        return tuple(read_summaries(places, listener))


def _parities(places: tuple[Path, ...], models: Iterable[str]) -> tuple[Parity, ...]:
    """Comparisons of these models' settings, in these folders and in `results/`, newest first."""
    from moe_bench.results.parity import read_parities

    roots = {place.resolve() for place in (results_root(), *places)}
    found = [one for root in roots for one in read_parities(root, models=models)]
    return tuple(sorted(found, key=lambda one: one.provenance.started_at, reverse=True))


def _missing(places: tuple[Path, ...]) -> tuple[MissingPoint, ...]:
    """What was submitted or run for these folders and left no record there."""
    from moe_bench.launch.jobs import all_jobs
    from moe_bench.launch.runner import run_captured
    from moe_bench.report.scaling import missing_points
    from moe_bench.results.reading import Listener, read_entries

    # whoever has read the records before has said what there is to say of their files
    silent = Listener(on_skipped=_ignore, on_note=_ignore, on_progress=_ignore)
    jobs: list[JobReport] = []
    for place in filter(Path.is_dir, places):
        found = all_jobs(place, read_entries((place,), silent), run=run_captured)
        jobs += found.reports
        for problem in found.problems:
            typer.echo(f"{problem}; what became of some jobs is not known here", err=True)
    return missing_points(sorted(jobs, key=lambda job: job.started_at, reverse=True))


def _ignore(*_: object) -> None:
    return


def _write_page(path: Path, places: tuple[Path, ...], names: list[str] | None) -> None:
    from moe_bench.cli.listening import listening
    from moe_bench.report.html.page import ReportData, render_page
    from moe_bench.report.html.projections import projections
    from moe_bench.report.html.recipes import page_recipes
    from moe_bench.results.published import load_rows
    from moe_bench.results.reading import read_newest
    from moe_bench.results.training_run import is_run, read_run

    training = tuple(read_run(place) for place in places if is_run(place))
    places = tuple(place for place in places if not is_run(place))
    with listening() as listener:
        newest, older = read_newest(places, listener)
    ran = [one.plan for one in newest] + [one.plan for one in older] + [one.job.plan for one in training]
    shown = page_recipes(make_loader(), names or (), ran)
    projected = projections(shown)
    page = render_page(
        ReportData(
            records=newest,
            older=older,
            training=training,
            missing=_missing(places),
            parities=_parities(places, {recipe.model.key for recipe in shown}),
            recipes=shown,
            rows=load_rows(data_root() / "results" / "published"),
            projected=projected.points,
            pipeline_pictures=projected.pipeline_pictures,
            waterfalls=projected.waterfalls,
            unprojected=projected.refused,
            version=__version__,
        )
    )
    path.write_text(page, encoding="utf-8")
    typer.echo(path)


def _print_scaling(
    places: tuple[Path, ...],
    model: str | None,
    projected: bool,
    plot: Path | None,
    table_format: TableFormat,
    as_json: bool,
) -> None:
    from moe_bench.report.scaling import scaling_of
    from moe_bench.report.scaling_plot import write_scaling_plot
    from moe_bench.report.scaling_table import scaling_frame, scaling_view
    from moe_bench.results.published import load_rows

    loader = make_loader()
    models = {key: loader.model(key) for key in recipe_model_keys(loader.root)}
    runs = _runs(places)
    found = scaling_of(
        runs,
        load_rows(data_root() / "results" / "published"),
        models,
        projected=_projected_points(runs, model) if projected else (),
        missing=_missing(places),
        model=model,
    )
    if plot is not None:
        write_scaling_plot(found.curves, plot)
    _print_frame(scaling_frame(found), lambda: scaling_view(found), table_format, as_json)


def _projected_points(runs: tuple[RunSummary, ...], model: str | None) -> tuple[ScalingPoint, ...]:
    """Of what ran, of `model` where it is named; else of its default run, or of every model's."""
    from moe_bench.report.html.projections import projections
    from moe_bench.report.html.recipes import page_recipes
    from moe_bench.results.published import model_key

    loader, plans = make_loader(), [run.plan for run in runs]
    default: tuple[str, ...] = ()
    if model is not None:
        plans = [plan for plan in plans if plan.recipe.model.key == model_key(model)]
        default = tuple({model_key(model)} & set(recipe_model_keys(loader.root))) if not plans else ()
        if not (plans or default):
            return ()
    found = projections(page_recipes(loader, default, plans))
    for name, reason in found.refused.items():
        typer.echo(f"not projected: {name}: {reason}", err=True)
    return found.points


def _print_frame(
    frame: pd.DataFrame, view: Callable[[], RenderableType], table_format: TableFormat, as_json: bool
) -> None:
    from moe_bench.report.frame import as_csv, as_markdown

    if table_format is TableFormat.MARKDOWN:
        typer.echo(as_markdown(frame))
    elif table_format is TableFormat.CSV:
        typer.echo(as_csv(frame), nl=False)
    else:
        print_view(view(), json.loads(frame.to_json(orient="records")), as_json)
