"""Verbs that read results and published numbers: report, published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_bench.cli.app import READ, app
from moe_bench.cli.options import JsonOption, TableFormat, make_loader, print_view, results_root
from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import data_root, find_recipe


@app.command(rich_help_panel=READ)
def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Records or folders of them; default: results/.")
    ] = None,
    table_format: Annotated[
        TableFormat, typer.Option("--format", help="How to print.")
    ] = TableFormat.TERMINAL,
    as_json: JsonOption = False,
) -> None:
    """A table of records: step time, tokens/s/GPU, TFLOPs/GPU, MFU, memory."""
    from moe_bench.report.frame import as_csv, as_markdown, frame_view, records_frame
    from moe_bench.results.store import read_records

    frame = records_frame(tuple(read_records(tuple(results or (results_root(),)))))
    if table_format is TableFormat.MARKDOWN:
        typer.echo(as_markdown(frame))
    elif table_format is TableFormat.CSV:
        typer.echo(as_csv(frame), nl=False)
    else:
        print_view(frame_view(frame), json.loads(frame.to_json(orient="records")), as_json)


@app.command(rich_help_panel=READ)
def published(
    model: Annotated[str | None, typer.Option("--model", help="Printed name or folder of recipes/.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="h100_sxm, H100, GB200, ...")] = None,
    precision: Annotated[
        str | None, typer.Option("--precision", help="bf16, fp8_blockwise, MXFP8, ...")
    ] = None,
    num_gpus: Annotated[int | None, typer.Option("--num-gpus", min=1)] = None,
    trust: Annotated[str | None, typer.Option("--trust", help="Worst grade wanted: A, B or C.")] = None,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Kind of row, or all; default: training.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Find rows that contradict themselves.")] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What others published: tokens/s/GPU, and TFLOPs/GPU in one way of counting."""
    from moe_bench.report import published as view
    from moe_bench.results.contradictions import contradictions, load_known
    from moe_bench.results.published import load_rows
    from moe_bench.results.selection import Selection, selected

    loader = make_loader()
    folder = data_root() / "results" / "published"
    keys = [path.parent.name for path in sorted(loader.root.glob("*/model.yaml"))]
    rows = load_rows(folder)
    if check:
        templates = {key: loader.recipe(find_recipe(key, loader)) for key in keys}
        found = contradictions(rows, templates, load_known(folder / "known" / "contradictions.yaml"))
        print_view(view.check_view(found, num_rows=len(rows)), view.check_json(found), as_json)
        raise typer.Exit(BadInputError.exit_code if any(one.known is None for one in found) else 0)
    asked = Selection(
        model=model, system=system, precision=precision, num_gpus=num_gpus, trust=trust, kind=kind
    )
    lines = view.published_lines(selected(rows, asked), {key: loader.model(key) for key in keys})
    if as_csv:
        typer.echo(view.as_csv(lines), nl=False)
    else:
        print_view(view.published_view(lines), list(lines), as_json)
