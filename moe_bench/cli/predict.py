"""Verbs that predict, without a GPU: audit, dryrun."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_bench.cli.app import PREDICT, app
from moe_bench.cli.files import drawing_to_write
from moe_bench.cli.options import JsonOption, RecipeArgument, ScaleOption, SetOption, plan_of, print_view


@app.command(rich_help_panel=PREDICT)
def audit(
    recipe: RecipeArgument,
    changes: SetOption = None,
    tokens_per_s_per_gpu: Annotated[
        float | None,
        typer.Option(
            "--tokens-per-s-per-gpu", min=0, max=1e9, help="Adds the TFLOPs/GPU of this throughput."
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Count a recipe's FLOPs under eight conventions, and name the terms in which they differ."""
    from moe_bench.report.audit import audit_json, audit_lines, audit_view

    run = plan_of(recipe, scale=ScaleOption.FULL, num_gpus=None, changes=changes).recipe
    lines = audit_lines(run)
    print_view(
        audit_view(lines, tokens_per_s_per_gpu=tokens_per_s_per_gpu),
        audit_json(run, lines, tokens_per_s_per_gpu=tokens_per_s_per_gpu),
        as_json,
    )


@app.command(rich_help_panel=PREDICT)
def dryrun(
    recipe: RecipeArgument,
    rank: Annotated[int | None, typer.Option("--rank", help="Rank of the job to step; default: 0.")] = None,
    all_stages: Annotated[
        bool, typer.Option("--all-stages", help="Step the first rank of every pipeline stage.")
    ] = False,
    routing: Annotated[
        Path | None,
        typer.Option("--routing", help="JSON matrix of tokens per sender and expert; default: balanced."),
    ] = None,
    micro_batches: Annotated[
        int | None,
        typer.Option(
            "--micro-batches", help="Micro batches to run; default: the fewest that reach the steady state."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot",
            callback=drawing_to_write,
            help="Draw memory per pipeline rank and over the step (SVG).",
        ),
    ] = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Step one rank through Megatron-Core at the real world size, without a GPU: memory, FLOPs, traffic."""
    from moe_bench.spec.derive_dryrun import dryrun_plan, ranks_to_run, require_micro_batches
    from moe_bench.spec.routing_matrix import read_counts

    asked = plan_of(recipe, scale=ScaleOption.FULL, num_gpus=None, changes=changes)
    plan = dryrun_plan(asked.recipe, modified=asked.modified)
    ranks = ranks_to_run(plan.recipe, rank=rank, all_stages=all_stages)
    if micro_batches is not None:
        require_micro_batches(plan.recipe, micro_batches)
    counts = None if routing is None else read_counts(routing)
    from moe_bench.harness.dryrun.start import load_dry_run

    dry_run = load_dry_run()
    outcome = dry_run(asked.recipe, plan, ranks, counts=counts, num_micro_batches=micro_batches)
    from moe_bench.report.dryrun_plot import write_plot
    from moe_bench.report.dryrun_view import dry_run_json, dry_run_view

    if plot is not None:
        write_plot(outcome, plot)
    print_view(dry_run_view(outcome), dry_run_json(outcome), as_json)
