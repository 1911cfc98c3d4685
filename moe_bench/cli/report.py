"""The verb that shows many results at once: report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from moe_bench.cli.app import READ, app
from moe_bench.cli.options import JsonOption, TableFormat, make_loader, print_view, results_root
from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import data_root


@app.command(rich_help_panel=READ)
def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Records or folders of them; default: results/.")
    ] = None,
    scaling: Annotated[
        bool, typer.Option("--scaling", help="Weak and strong efficiency, of results and published rows.")
    ] = False,
    model: Annotated[
        str | None, typer.Option("--model", help="With --scaling: one model, by folder or printed name.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option("--plot", help="With --scaling: draw the curves, too (.png, .svg, .pdf).")
    ] = None,
    table_format: Annotated[
        TableFormat, typer.Option("--format", help="How to print.")
    ] = TableFormat.TERMINAL,
    as_json: JsonOption = False,
) -> None:
    """Results as a table or as scaling curves: step time, tokens/s/GPU, TFLOPs/GPU, MFU, memory."""
    from moe_bench.report.frame import as_csv, as_markdown, frame_view, records_frame
    from moe_bench.results.store import read_records

    if not scaling and (model is not None or plot is not None):
        raise BadInputError("--model and --plot go with --scaling; add it, or drop them")
    records = tuple(read_records(tuple(results or (results_root(),))))
    if scaling:
        from moe_bench.report import scaling_table
        from moe_bench.report.scaling import scaling_of
        from moe_bench.report.scaling_plot import write_scaling_plot
        from moe_bench.results.published import load_rows

        loader = make_loader()
        keys = [path.parent.name for path in loader.root.glob("*/model.yaml")]
        rows = load_rows(data_root() / "results" / "published")
        found = scaling_of(records, rows, {key: loader.model(key) for key in keys}, model=model)
        if plot is not None:
            write_scaling_plot(found.curves, plot)
        frame, view = scaling_table.scaling_frame(found.curves), scaling_table.scaling_view(found)
    else:
        frame = records_frame(records)
        view = frame_view(frame)
    if table_format is TableFormat.MARKDOWN:
        typer.echo(as_markdown(frame))
    elif table_format is TableFormat.CSV:
        typer.echo(as_csv(frame), nl=False)
    else:
        print_view(view, json.loads(frame.to_json(orient="records")), as_json)
