"""The verb that shows how the experts of a training run fare: health."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_bench.cli.app import MODEL, app
from moe_bench.cli.files import picture_to_write
from moe_bench.cli.options import JsonOption, print_view
from moe_bench.errors import BadInputError


@app.command(rich_help_panel=MODEL)
def health(
    folder: Annotated[Path, typer.Argument(help="Folder of a run of `train`, finished or not.")],
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            metavar="FILE",
            callback=picture_to_write,
            help="Draw load and entropy (.png, .svg, .pdf).",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show how experts fare in training: load by layer, entropy, drops, dead experts, biases, alarms."""
    from moe_bench.report.health_view import health_json, health_view, write_health_plot
    from moe_bench.results.training_health import HEALTH, read_health

    lines = tuple(read_health(folder))
    if not lines:
        raise BadInputError(
            f"{folder / HEALTH}: nothing there; name the folder of a run of a model with experts that has "
            "taken --health-every steps"
        )
    if plot is not None:
        write_health_plot(lines, plot)
    print_view(health_view(lines), health_json(lines), as_json)
