"""The verb that holds the projection against the published record: accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from moe_bench.cli.app import READ, app
from moe_bench.cli.options import JsonOption, print_view, require_one_output
from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import data_root


@app.command(rich_help_panel=READ)
def accuracy(
    registry: Annotated[
        Path | None, typer.Option("--registry", help="File of rows; default: results/published.")
    ] = None,
    cross_validate: Annotated[
        Literal["model", "layout", "system", "release"] | None,
        typer.Option("--cross-validate", help="Refit all fitted constants with each such group left out."),
    ] = None,
    memory: Annotated[
        bool,
        typer.Option(
            "--memory", help="Judge memory instead: runs that ran, printed peaks, runs that failed."
        ),
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV, one line per row.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Hold projections against every published row, by row and group, beside a naive predictor."""
    from moe_bench.projection.accuracy.memory import as_they_ran, load_evidence, memory_record
    from moe_bench.projection.accuracy.step_time import accuracy_of, projectable
    from moe_bench.projection.rows.inference import load_catalogue
    from moe_bench.report.accuracy_json import accuracy_json
    from moe_bench.report.accuracy_view import Accuracy, accuracy_csv, accuracy_view
    from moe_bench.results.flat_registry import read_registry
    from moe_bench.results.published import load_rows

    require_one_output(csv=as_csv, json=as_json)
    if memory and (as_csv or cross_validate is not None):
        raise BadInputError("--memory fits nothing and has no --csv; drop --cross-validate and --csv")
    root = data_root()
    rows = load_rows(root / "results" / "published") if registry is None else read_registry(registry)
    catalogue = load_catalogue(root / "recipes")
    evidence = load_evidence(root / "results" / "published" / "known")
    if memory:
        from moe_bench.report.memory_record_view import memory_record_json, memory_record_view

        record = memory_record(rows, evidence, catalogue)
        print_view(memory_record_view(record), memory_record_json(record), as_json)
        return
    found = projectable(as_they_ran(rows, evidence), catalogue)
    made = Accuracy(
        found=found,
        results=accuracy_of(found, left_out=cross_validate),
        left_out=cross_validate,
    )
    if as_csv:
        typer.echo(accuracy_csv(made), nl=False)
    else:
        print_view(accuracy_view(made), accuracy_json(made), as_json)
