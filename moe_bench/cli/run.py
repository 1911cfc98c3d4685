"""Verbs that run recipes: run, submit."""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import RUN, app
from moe_bench.cli.options import (
    JsonOption,
    KernelsOptionType,
    NumGpusOption,
    OneRank,
    RecipeArgument,
    RoutingOption,
    ScaleOption,
    ScaleOptionType,
    SetOption,
    StageOption,
    StrongOption,
    make_console,
    plan_of,
    print_view,
    results_root,
    run_arguments,
    whole_numbers,
)
from moe_bench.cli.profile import (
    ProfileOption,
    ProfileStepsOption,
    TracedOption,
    profile_arguments,
    profile_of,
)
from moe_bench.cli.trackers import MlflowOption, TensorboardOption, Trackers, WandbOption
from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.spec.catalogue import data_root

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_bench.launch.job import Job
    from moe_bench.launch.verbs import Outcome
    from moe_bench.results.record import Record
    from moe_bench.spec.profile import Profile
    from moe_bench.spec.rendezvous import Rendezvous
    from moe_bench.spec.scale import Plan


RepeatOption = Annotated[int, typer.Option("--repeat", min=0, hidden=True)]
"""Which of several equal runs this one is; set by `--repeats`."""


@app.command(rich_help_panel=RUN)
def run(
    recipe: RecipeArgument,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    strong: StrongOption = False,
    changes: SetOption = None,
    kernels: KernelsOptionType = None,
    routing: RoutingOption = "balanced",
    stage: StageOption = None,
    dryrun: Annotated[
        bool, typer.Option("--dryrun", help="With --scale slice: also give its peak memory by a dry run.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the record.")] = None,
    repeats: Annotated[
        int, typer.Option("--repeats", min=1, help="Number of runs, each with its own record.")
    ] = 1,
    repeat: RepeatOption = 0,
    profile: ProfileOption = None,
    profile_steps: ProfileStepsOption = None,
    traced: TracedOption = None,
    tensorboard: TensorboardOption = None,
    mlflow: MlflowOption = None,
    wandb: WandbOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a few steps through Megatron-Core, write a record and print its table."""
    from moe_bench.launch.environment import current_environment
    from moe_bench.launch.rendezvous import rendezvous_from
    from moe_bench.launch.runner import run_captured
    from moe_bench.results.store import record_folder

    trackers = Trackers(tensorboard=tensorboard, mlflow=mlflow, wandb=wandb)
    trackers.require()
    one_rank = OneRank(kernels=kernels, routing=routing, stage=stage)
    plan = plan_of(recipe, scale=scale, num_gpus=num_gpus, changes=changes, strong=strong, one_rank=one_rank)
    if dryrun and not plan.is_slice:
        raise BadInputError("--dryrun is of a slice; use the verb dryrun")
    root = out or results_root()
    place = rendezvous_from(current_environment(), run_captured)
    if place is not None and repeats > 1:
        raise BadInputError("--repeats starts every rank afresh, a rank cannot: use submit --repeats")
    folder = record_folder(root, plan)
    before = set(folder.glob("*.json"))
    profiled = profile_of(profile, profile_steps, plan=plan, place=place, folder=folder, traced=traced)
    if place is None and plan.recipe.system.gpu is not None:
        args = run_arguments(recipe, scale=scale, num_gpus=num_gpus, changes=changes, strong=strong)
        args += (*one_rank.arguments(), *(["--dryrun"] if dryrun else []))
        args += (*profile_arguments(profile, profile_steps), "--out", str(root))
        args += (*(["--json"] if as_json else []), *trackers.arguments())
        _start_ranks(plan, num_repeats=repeats, run_args=args)
    else:
        for index in range(repeat, repeat + repeats):
            is_first = index == repeat
            record = _measure(plan, place=place, repeat=index, is_first=is_first, root=root, profile=profiled)
            if record is not None:  # rank 0 reports for all
                peak_bytes = _dry_run_peak_bytes(plan) if dryrun and is_first else None
                _report(record, root, trackers, is_first, as_json, dry_run_peak_bytes=peak_bytes)
    if repeats > 1 and not as_json:
        typer.echo(_spread(set(folder.glob("*.json")) - before))


def _spread(paths: set[Path]) -> str:
    """What the records of several equal runs say together."""
    from moe_bench.report.repeats import repeats_line
    from moe_bench.results.store import read_record

    return repeats_line([read_record(path) for path in sorted(paths)])


def _start_ranks(plan: Plan, *, num_repeats: int, run_args: tuple[str, ...]) -> None:
    """Start a rank for every GPU of this machine, in the place of this process where there is one run."""
    from moe_bench.harness.mcore_config import megatron_arguments
    from moe_bench.harness.requirements import require_runnable
    from moe_bench.launch.here import repeat_ranks_here, require_gpus_here, start_ranks_here
    from moe_bench.launch.runner import run_captured, run_live

    # torchrun ends with 1 whatever a rank ends with, so what is missing is found before it starts
    require_gpus_here(plan, run=run_captured)
    require_runnable(megatron_arguments(plan.recipe))
    if num_repeats == 1:
        start_ranks_here(plan, run_args=tuple(sys.argv[2:]))
    code = repeat_ranks_here(plan, run_args=run_args, num_repeats=num_repeats, run_live=run_live)
    if code:
        raise typer.Exit(code)


def _measure(
    plan: Plan,
    *,
    place: Rendezvous | None,
    repeat: int,
    is_first: bool,
    root: Path,
    profile: Profile | None,
) -> Record | None:
    from moe_bench.harness.start import quiet_imports
    from moe_bench.launch.environment import current_environment
    from moe_bench.launch.local_runs import noted
    from moe_bench.report.progress import announce, step_progress

    console = make_console(stderr=True)
    is_speaker = place is None or place.rank == 0
    if is_first and is_speaker:
        announce(plan, console)
    environment, command = current_environment(), tuple(sys.argv)
    note = noted(root, plan, repeat=repeat, command=command, env=environment) if is_speaker else nullcontext()
    with note:
        with quiet_imports():
            from moe_bench.harness.measure import measure
        with step_progress(plan, console, is_alone=place is None) as on_step:
            return measure(
                plan,
                rendezvous=place,
                environment=environment,
                command=command,
                source_root=data_root(),
                on_step=on_step,
                repeat=repeat,
                profile=profile if profile is None else profile.of_repeat(repeat),
            )


def _dry_run_peak_bytes(plan: Plan) -> int:
    from moe_bench.harness.dryrun.slice_peak import slice_peak_bytes

    return slice_peak_bytes(plan)


def _report(
    record: Record,
    root: Path,
    trackers: Trackers,
    is_first: bool,
    as_json: bool,
    *,
    dry_run_peak_bytes: int | None,
) -> None:
    from moe_bench.report.tables import run_json, run_line, run_view
    from moe_bench.results.parity import read_parities
    from moe_bench.results.store import write_record

    path = write_record(root, record)
    parities = read_parities(root, models=[record.plan.recipe.model.key])
    table = run_view(
        record,
        path,
        parities=parities,
        dry_run_peak_bytes=dry_run_peak_bytes,
        was_announced=all(make_console(stderr=stderr).is_terminal for stderr in (False, True)),
    )
    view = table if is_first else run_line(record, path)
    print_view(view, run_json(record, path, dry_run_peak_bytes=dry_run_peak_bytes), as_json)
    for line in trackers.write(record, path):
        typer.echo(line, err=True)


SizesOption = Annotated[
    str | None,
    typer.Option(
        "--num-gpus",
        metavar="N,N,...",
        help="Sizes of the scaling family, a job each; with --scale node one number.",
    ),
]
VaryOption = Annotated[
    list[str] | None,
    typer.Option(
        "--vary", metavar="FIELD=VALUE,...", help="One job per value; several options make the product."
    ),
]
FamiliesOption = Annotated[
    Path, typer.Option("--families", help="Folder for the recipe files of --num-gpus.")
]
SiteOption = Annotated[
    str | None, typer.Option("--site", help="File of slurm/sites; default: the one of this cluster.")
]
NodesOption = Annotated[
    int | None, typer.Option("--nodes", min=1, help="Number of nodes; default: the fewest.")
]
JobsOption = Annotated[int, typer.Option("--repeats", min=1, help="Jobs of each kind, interleaved.")]
WaitOption = Annotated[bool, typer.Option("--wait", help="Wait for the job, and end with its exit code.")]


@app.command(rich_help_panel=RUN)
def submit(
    recipe: RecipeArgument,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: SizesOption = None,
    strong: StrongOption = False,
    changes: SetOption = None,
    vary: VaryOption = None,
    repeats: JobsOption = 1,
    repeat: RepeatOption = 0,
    profile: ProfileOption = None,
    profile_steps: ProfileStepsOption = None,
    families: FamiliesOption = Path("families"),
    site: SiteOption = None,
    nodes: NodesOption = None,
    tensorboard: TensorboardOption = None,
    mlflow: MlflowOption = None,
    wandb: WandbOption = None,
    wait: WaitOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the commands and queue nothing.")] = False,
    inside_job: Annotated[bool, typer.Option("--inside-job", hidden=True)] = False,
    as_json: JsonOption = False,
) -> None:
    """Queue a recipe with Slurm at the size it needs, its scaling family, or an experiment."""
    from moe_bench.cli.experiment import planned_jobs, write_recipe_files
    from moe_bench.launch.variants import interleaved
    from moe_bench.launch.verbs import job_verb, submit_verb

    if scale in (ScaleOption.SLICE, ScaleOption.TINY_SLICE):
        raise BadInputError(f"submit --scale {scale.value}: a slice is one process; use run on one machine")
    trackers = Trackers(tensorboard=tensorboard, mlflow=mlflow, wandb=wandb)
    trackers.require()
    variants = interleaved(vary or (), num_repeats=repeats, sizes=_sizes(num_gpus))
    # every one is checked before the first is queued
    planned = planned_jobs(
        recipe, variants, scale=scale, strong=strong, changes=changes, first_repeat=repeat, folder=families
    )
    for refusal in planned.refused:
        typer.echo(str(refusal), err=True)
    passed_on = (*profile_arguments(profile, profile_steps), *trackers.arguments())
    asked = [replace(one, run_args=(*one.run_args, *passed_on)) for one in planned.jobs]
    jobs = [job_verb(one, data_root=data_root(), site=site, num_nodes=nodes) for one in asked]
    _require_startable(jobs, dry_run=dry_run)
    if not dry_run:
        write_recipe_files(planned, families)
    # the job that a script of the user's runs in has the size of one recipe, not of an experiment
    takes_this_job = inside_job and len(variants) == 1
    roots = {"data_root": data_root(), "results_root": results_root()}
    outcomes = []
    for one, job in zip(asked, jobs, strict=True):
        outcome = submit_verb(one, job, **roots, dry_run=dry_run, inside_job=takes_this_job)
        outcomes.append(outcome)
        if outcome.lines and not as_json:
            typer.echo("\n".join(outcome.lines))
    if as_json:
        _print_json(outcomes)
    raise typer.Exit(max(outcome.wait() if wait else outcome.exit_code for outcome in outcomes))


def _print_json(outcomes: Sequence[Outcome]) -> None:
    found = [outcome.as_json() for outcome in outcomes]
    typer.echo(json.dumps(found if len(found) > 1 else found[0]))


def _require_startable(jobs: Sequence[Job], *, dry_run: bool) -> None:
    """Raise now what would end a job in its first second, after hours in the queue; a dry run says it."""
    from moe_bench.harness.mcore_config import megatron_arguments
    from moe_bench.harness.requirements import require_runnable, require_supported
    from moe_bench.launch.verbs import runs_with_this_python

    said: set[str] = set()
    for job in jobs:
        require = require_runnable if runs_with_this_python(job, data_root=data_root()) else require_supported
        try:
            require(megatron_arguments(job.recipe))
        except MissingRequirementError as error:
            refusal = f"{job.recipe.name}: {error}"
            if not dry_run:
                raise MissingRequirementError(f"{refusal}; nothing was queued") from error
            if refusal not in said:
                typer.echo(f"would be refused: {refusal}", err=True)
            said.add(refusal)


def _sizes(listed: str | None) -> tuple[int, ...]:
    return () if listed is None else whole_numbers(listed, option="--num-gpus", example="64,128,256")
