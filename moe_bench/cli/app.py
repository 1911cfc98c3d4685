"""The application that every verb registers with, and the groups in which `--help` shows them."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_bench import __version__
from moe_bench.errors import EXIT_CODES

RECIPES, PREDICT, RUN, READ, MODEL = ("Recipes", "Predict", "Run", "Read", "Model")
"""Groups of `--help`: each answers a question that costs more than the one before."""

app = typer.Typer(
    help="Recipes, measurements and published numbers of Mixture-of-Experts training on Megatron-Core.",
    epilog="Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES) + ".",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit
