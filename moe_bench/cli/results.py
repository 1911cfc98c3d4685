"""The verb about records: list, show, check and export them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple

import typer

from moe_bench.cli.app import READ, app
from moe_bench.cli.options import JsonOption, print_view, record_places, require_one_output, results_root
from moe_bench.cli.trackers import MlflowOption, TensorboardOption, Trackers, WandbOption
from moe_bench.errors import BadInputError

if TYPE_CHECKING:
    from moe_bench.results.entry import Entry
    from moe_bench.results.query import Query

DEFAULT_LIMIT = 50

ResultsOption = Annotated[
    list[Path] | None, typer.Option("--results", help="Records or folders of them; default: results/.")
]

results_app = typer.Typer()
app.add_typer(results_app, name="results", rich_help_panel=READ)


class Asked(NamedTuple):
    """What was said before `show`, `check` or `export`."""

    places: tuple[Path, ...]
    query: Query


@results_app.callback(invoke_without_command=True)
def results(
    context: typer.Context,
    results: ResultsOption = None,
    model: Annotated[
        str | None, typer.Option("--model", help="Model, as a folder of recipes/ or as printed.")
    ] = None,
    recipe: Annotated[str | None, typer.Option("--recipe", help="<model>/<run>, or <run>.")] = None,
    scale: Annotated[str | None, typer.Option("--scale", help="full, node, smoke, slice, ...")] = None,
    status: Annotated[str | None, typer.Option("--status", help="steady, drifting or short.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="h100_sxm, cpu_host, ...")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="bf16, fp8_blockwise, ...")] = None,
    num_ranks: Annotated[int | None, typer.Option("--num-ranks", min=1)] = None,
    commit: Annotated[str | None, typer.Option("--commit", help="First digits of a commit.")] = None,
    job: Annotated[str | None, typer.Option("--job", help="Number of a job or process.")] = None,
    since: Annotated[str | None, typer.Option("--since", help="UTC, such as 2026-11-22.")] = None,
    until: Annotated[str | None, typer.Option("--until", help="UTC, inclusive.")] = None,
    modified: Annotated[
        bool | None,
        typer.Option("--modified/--as-asked", help="Only runs with the user's own changes, or only without."),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help=f"Most lines; default: {DEFAULT_LIMIT} in a table, else all."),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List records of runs, newest first; files that are no records are named and skipped."""
    from moe_bench.report.results_view import entries_csv, entries_view, entry_line
    from moe_bench.results.query import Query

    require_one_output(csv=as_csv, json=as_json)
    query = Query(
        model=model,
        recipe=recipe,
        scale=scale,
        status=status,
        system=system,
        precision=precision,
        num_ranks=num_ranks,
        commit=commit,
        job=job,
        since=since,
        until=until,
        is_modified=modified,
    )
    context.obj = Asked(record_places(results), query)
    if context.invoked_subcommand is not None:
        return
    found = _entries(context.obj)
    shown = found[: limit or (None if as_csv or as_json else DEFAULT_LIMIT)]
    if as_csv:
        typer.echo(entries_csv(shown), nl=False)
    else:
        view = entries_view(shown, num_found=len(found))
        print_view(view, [entry_line(entry) for entry in shown], as_json)


IdArgument = Annotated[
    str, typer.Argument(metavar="ID", help="As listed, a part of it that no other has, a job, or a path.")
]


@results_app.command()
def show(
    context: typer.Context, record_id: IdArgument, results: ResultsOption = None, as_json: JsonOption = False
) -> None:
    """Show one record: its numbers, and where and with what it was made."""
    from moe_bench.report.results_view import record_view
    from moe_bench.report.tables import run_json
    from moe_bench.results.parity import read_parities
    from moe_bench.results.store import read_record

    entry = _entry(_among(context, results), record_id)
    record = read_record(entry.path)
    provenance = {"provenance": record.provenance.model_dump(mode="json")}
    parities = read_parities(results_root(), models=[record.plan.recipe.model.key])
    print_view(record_view(record, entry, parities), run_json(record, entry.path) | provenance, as_json)


@results_app.command()
def check(context: typer.Context, results: ResultsOption = None, as_json: JsonOption = False) -> None:
    """Read every record in full: one line per file that is none, is damaged, or is there twice."""
    from moe_bench.cli.listening import listening
    from moe_bench.results.query import queried
    from moe_bench.results.reading import read_entries
    from moe_bench.results.validate import duplicate_problems, file_problems
    from moe_bench.results.workers import over_files

    problems: list[str] = []
    with listening(on_skipped=problems.append) as listener:
        asked = _among(context, results)
        entries = queried(read_entries(asked.places, listener), asked.query)
        paths = [entry.path for entry in entries]
        for number, found in enumerate(over_files(file_problems, paths), start=1):
            problems += found
            listener.on_progress(number, len(paths))
    problems = sorted([*problems, *duplicate_problems(entries)])
    if as_json:
        typer.echo(json.dumps({"num_records": len(entries), "problems": problems}, indent=1))
    else:
        numbers = (("record", len(entries)), ("problem", len(problems)))
        counts = [f"{num or 'no'} {what}{'' if num == 1 else 's'}" for what, num in numbers]
        typer.echo("\n".join([*problems, ", ".join(counts)]))
    raise typer.Exit(BadInputError.exit_code if problems else 0)


@results_app.command()
def export(
    context: typer.Context,
    record_ids: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ID ...]", help="As for show; default: all that are chosen."),
    ] = None,
    results: ResultsOption = None,
    tensorboard: TensorboardOption = None,
    mlflow: MlflowOption = None,
    wandb: WandbOption = None,
) -> None:
    """Write records for TensorBoard, MLflow or Weights & Biases: curves by step, settings and outcome."""
    from moe_bench.results.store import read_record

    trackers = Trackers(tensorboard=tensorboard, mlflow=mlflow, wandb=wandb)
    if not trackers.arguments():
        raise BadInputError("results export: for what? add --tensorboard DIR, --mlflow NAME or --wandb NAME")
    trackers.require()
    asked = _among(context, results)
    named = tuple(_entry(asked, record_id) for record_id in record_ids or ())
    for entry in named or _entries(asked):
        for line in trackers.write(read_record(entry.path), entry.path):
            typer.echo(line)


def _among(context: typer.Context, results: list[Path] | None) -> Asked:
    """What was said before the command, with the places that were named behind it."""
    asked: Asked = context.obj
    return asked if results is None else asked._replace(places=tuple(results))


def _entries(asked: Asked) -> tuple[Entry, ...]:
    from moe_bench.cli.listening import listening
    from moe_bench.results.query import queried
    from moe_bench.results.reading import read_entries

    with listening() as listener:
        return queried(read_entries(asked.places, listener), asked.query)


def _entry(asked: Asked, record_id: str) -> Entry:
    from moe_bench.results.entry import entry_of
    from moe_bench.results.query import entry_by_id
    from moe_bench.results.summary import read_summary

    path = Path(record_id)
    if path.is_file():
        return entry_of(read_summary(path), path)
    return entry_by_id(_entries(asked), record_id)
