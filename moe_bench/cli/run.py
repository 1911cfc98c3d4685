"""Verbs that run recipes: run, submit."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_bench.cli.app import RUN, app
from moe_bench.cli.options import (
    JsonOption,
    NumGpusOption,
    RecipeArgument,
    ScaleOption,
    ScaleOptionType,
    SetOption,
    make_console,
    plan_of,
    print_view,
    results_root,
    run_arguments,
)
from moe_bench.spec.catalogue import data_root


@app.command(rich_help_panel=RUN)
def run(
    recipe: RecipeArgument,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the record.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a few steps through Megatron-Core, write a record and print its table."""
    from moe_bench.harness.mcore_config import megatron_arguments
    from moe_bench.harness.requirements import require_runnable
    from moe_bench.launch.environment import current_environment
    from moe_bench.launch.here import require_gpus_here, start_ranks_here
    from moe_bench.launch.rendezvous import rendezvous_from
    from moe_bench.launch.runner import run_captured

    plan = plan_of(recipe, scale=scale, num_gpus=num_gpus, changes=changes)
    environment = current_environment()
    place = rendezvous_from(environment, run_captured)
    if place is None and plan.recipe.system.gpu is not None:
        # torchrun ends with 1 whatever a rank ends with, so what is missing is found before it starts
        require_gpus_here(plan.recipe, asked=plan.asked, run=run_captured)
        require_runnable(megatron_arguments(plan.recipe))
        start_ranks_here(plan.recipe, run_args=tuple(sys.argv[2:]))
    from moe_bench.harness.start import load_measure
    from moe_bench.report.progress import announce, step_progress
    from moe_bench.report.tables import run_json, run_view
    from moe_bench.results.store import write_record

    console = make_console(stderr=True)
    if place is None or place.rank == 0:
        announce(plan, console)
    measure = load_measure()
    with step_progress(plan, console, is_alone=place is None) as on_step:
        record = measure(
            plan,
            rendezvous=place,
            environment=environment,
            command=tuple(sys.argv),
            source_root=data_root(),
            on_step=on_step,
        )
    if record is not None:  # rank 0 reports for all
        path = write_record(out or results_root(), record)
        print_view(run_view(record, path), run_json(record, path), as_json)


@app.command(rich_help_panel=RUN)
def submit(
    recipe: RecipeArgument,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    site: Annotated[
        str | None, typer.Option("--site", help="A file of slurm/sites; default: by cluster.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Nodes, where the fewest are not meant.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay, and end with the job's exit code.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command that would be run.")] = False,
    inside_job: Annotated[bool, typer.Option("--inside-job", hidden=True)] = False,
    as_json: JsonOption = False,
) -> None:
    """Queue a recipe with Slurm at the size that it needs."""
    from moe_bench.launch.verbs import submit_verb

    plan = plan_of(recipe, scale=scale, num_gpus=num_gpus, changes=changes)
    outcome = submit_verb(
        plan.recipe,
        run_args=run_arguments(recipe, scale=scale, num_gpus=num_gpus, changes=changes),
        data_root=data_root(),
        site=site,
        num_nodes=nodes,
        dry_run=dry_run,
        inside_job=inside_job,
    )
    if outcome.lines and not as_json:
        typer.echo("\n".join(outcome.lines))
    if as_json:
        typer.echo(json.dumps(outcome.as_json()))
    raise typer.Exit(outcome.wait() if wait else outcome.exit_code)
