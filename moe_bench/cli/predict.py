"""Verbs that predict, without a GPU: audit."""

from __future__ import annotations

from typing import Annotated

import typer

from moe_bench.cli.app import PREDICT, app
from moe_bench.cli.options import JsonOption, RecipeArgument, ScaleOption, SetOption, plan_of, print_view


@app.command(rich_help_panel=PREDICT)
def audit(
    recipe: RecipeArgument,
    changes: SetOption = None,
    tokens_per_s_per_gpu: Annotated[
        float | None,
        typer.Option("--tokens-per-s-per-gpu", min=0, help="A throughput; adds TFLOPs/GPU in each way."),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """The same run's FLOPs under eight conventions, and the terms in which they differ."""
    from moe_bench.report.audit import audit_json, audit_lines, audit_view

    run = plan_of(recipe, scale=ScaleOption.FULL, num_gpus=None, changes=changes).recipe
    lines = audit_lines(run)
    print_view(
        audit_view(lines, tokens_per_s_per_gpu=tokens_per_s_per_gpu),
        audit_json(run, lines, tokens_per_s_per_gpu=tokens_per_s_per_gpu),
        as_json,
    )
