"""Verbs that read results: report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_bench.cli.app import READ, app
from moe_bench.cli.options import JsonOption, TableFormat, print_view, results_root


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
