"""The verb that measures everything one GPU can tell, in the order of its value: h100."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import RUN, app
from moe_bench.cli.calibrate import calibrated_recipes, planned_calibration
from moe_bench.cli.gpu import (
    DEFAULT_SYSTEM,
    INTERRUPTED,
    PlannedSystemOption,
    ResumeOption,
    gpu_fact,
    gpu_to_measure_on,
    journal_to_resume,
    system_for_plan,
    system_or_default,
)
from moe_bench.cli.options import (
    JsonOption,
    OneRank,
    ResultsRootOption,
    ScaleOption,
    make_console,
    make_loader,
    plan_of,
    print_view,
    require_one_output,
    results_root,
)
from moe_bench.errors import BadInputError, MeasurementError
from moe_bench.spec.catalogue import data_root, find_recipe

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moe_bench.projection.calibration.plan import CalibrationPlan
    from moe_bench.projection.campaign.plan import CampaignPlan, PlannedStep, Sources
    from moe_bench.projection.campaign.wishes import CalibrateWish, LayerWish, SliceWish
    from moe_bench.results.campaign import CampaignHeader, CampaignJournal
    from moe_bench.spec.layer_case import LayerCase
    from moe_bench.spec.load import Loader
    from moe_bench.spec.scale import Plan
    from moe_bench.spec.system import SystemSpec

DEFAULT_BUDGET_S = 25 * 60.0
_LIMIT_FACTOR, _LIMIT_MARGIN_S = 3.0, 60.0
"""A step is ended after so many times its estimate and so much more."""


@app.command(rich_help_panel=RUN)
def h100(
    plan: Annotated[
        bool, typer.Option("--plan", help="Print every step with its seconds and memory, and run nothing.")
    ] = False,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Run the whole list with toys, on any machine.")
    ] = False,
    reach: Annotated[
        bool,
        typer.Option("--reach", help="Print the figures to be reached, beside what records say of them."),
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            "--only", metavar="KIND,...", help="Kinds of step to run, such as slice,layer,calibrate."
        ),
    ] = None,
    resume: ResumeOption = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="With --resume: also repeat the steps that failed.")
    ] = False,
    budget_seconds: Annotated[
        float,
        typer.Option("--budget-seconds", min=1, help="Run the most valuable that fit into so many seconds."),
    ] = DEFAULT_BUDGET_S,
    system: PlannedSystemOption = None,
    out: ResultsRootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure all that one GPU can tell of a cluster, most valuable first: kernels, slices, layers, peers."""
    require_one_output(reach=reach, plan=plan)
    if (resume or retry) and (reach or plan):
        raise BadInputError("--resume and --retry go on measuring; drop them, or --plan and --reach")
    loader = make_loader()
    if reach:
        _print_reach(out or results_root(), loader, as_json=as_json)
        return
    if plan:
        from moe_bench.report.campaign_view import campaign_plan_json, campaign_plan_view

        planned = _plan(system_for_plan(system, loader), loader, only, tiny, budget_seconds)
        print_view(campaign_plan_view(planned), campaign_plan_json(planned), as_json)
        return
    if retry and not resume:
        raise BadInputError("--retry takes up steps of a campaign that was begun; add --resume, or drop it")
    gpu = gpu_to_measure_on("h100", system, tiny=tiny, toys="the list with toys")
    planned = _plan(system_or_default(gpu, loader), loader, only, tiny, budget_seconds)
    root = out or results_root()
    journal = _journal(root, _header(planned, gpu=gpu, budget_s=budget_seconds), resume=resume)
    _measure(planned, root, journal, retries=retry, budget_s=budget_seconds, as_json=as_json)


def _print_reach(root: Path, loader: Loader, *, as_json: bool) -> None:
    from moe_bench.projection.campaign.predictions import predictions
    from moe_bench.report.reach_view import reach_json, reach_view
    from moe_bench.results.layer_record import layer_records
    from moe_bench.results.reach import reached
    from moe_bench.results.store import read_records

    runs = read_records((root,)) if root.is_dir() else ()
    figures = reached(layer_records(root), runs)
    system = loader.system(DEFAULT_SYSTEM)
    predicted = predictions(system, _sources(system, loader, tiny=False))
    print_view(reach_view(figures, predicted), reach_json(figures, predicted), as_json)


def _plan(system: SystemSpec, loader: Loader, only: str | None, tiny: bool, budget_s: float) -> CampaignPlan:
    from moe_bench.projection.campaign.plan import campaign_plan

    kinds = None if only is None else [part.strip() for part in only.split(",")]
    return campaign_plan(
        system, _sources(system, loader, tiny=tiny), only=kinds, is_tiny=tiny, budget_s=budget_s
    )


def _sources(system: SystemSpec, loader: Loader, *, tiny: bool) -> Sources:
    """Where the plan's estimates take recipes, layers and calibrations from."""
    from importlib.util import find_spec

    from moe_bench.projection.campaign.plan import Sources
    from moe_bench.results.calibration_tasks import OPERATIONS
    from moe_bench.results.sonicmoe import SHAPES
    from moe_bench.spec.layer_case import layer_case_of

    def slice_of(wish: SliceWish) -> Plan:
        return plan_of(
            wish.recipe,
            scale=ScaleOption.SLICE,
            num_gpus=None,
            changes=list(wish.changes),
            one_rank=OneRank(kernels=wish.kernels),
        )

    def layers_of(wish: LayerWish) -> Sequence[LayerCase]:
        if wish.recipe is None:
            return [shape.case(scale_down=1) for shape in SHAPES]
        return [layer_case_of(loader.recipe(find_recipe(wish.recipe, loader)))]

    def calibration_of(wish: CalibrateWish) -> CalibrationPlan:
        recipes = calibrated_recipes(None, loader, tiny=tiny)
        return planned_calibration(recipes, system, loader, wish.only or OPERATIONS, tiny, wish.budget_s)

    return Sources(
        slice_of=slice_of,
        layers_of=layers_of,
        calibration_of=calibration_of,
        installed=lambda module: find_spec(module) is not None,
        has_tests=(data_root() / "tests").is_dir(),
    )


def _measure(
    plan: CampaignPlan,
    root: Path,
    journal: CampaignJournal,
    *,
    retries: bool,
    budget_s: float,
    as_json: bool,
) -> None:
    """Run the plan, or the rest of it, write the campaign's file and print it.

    Raises MeasurementError where a step failed.
    """
    from moe_bench.launch.campaign import Due, run_campaign, run_logged
    from moe_bench.report.campaign_view import campaign_json, campaign_progress, campaign_view
    from moe_bench.results.campaign import read_campaign

    def due(one: PlannedStep) -> Due:
        limit_s = _LIMIT_FACTOR * one.estimated_s + _LIMIT_MARGIN_S
        return Due(step=one.step, estimated_s=one.estimated_s, limit_s=limit_s, absent=one.absent)

    wanted = [due(one) for one in (*plan.steps, *plan.over_budget)]
    num_done = len(journal.done)
    try:
        with campaign_progress(len(wanted), num_done, make_console(stderr=True)) as (on_start, on_end):
            num_left = run_campaign(
                wanted,
                journal,
                root,
                run=run_logged,
                budget_s=budget_s,
                retries=retries,
                on_start=lambda one: on_start(one.step, one.estimated_s),
                on_end=on_end,
            )
    except KeyboardInterrupt:
        num_done = len(journal.done)
        typer.echo(f"stopped after {num_done} of {len(wanted)} steps; go on with --resume", err=True)
        raise typer.Exit(INTERRUPTED) from None
    if num_left:
        typer.echo(f"the budget ended before {num_left} of {len(wanted)}; go on with --resume", err=True)
        return
    path = journal.finish()
    campaign = read_campaign(path)
    print_view(campaign_view(campaign), campaign_json(campaign, str(path)), as_json)
    failed = [one.step.key for one in campaign.outcomes if one.exit_code not in (0, None)]
    if failed:
        raise MeasurementError(f"{path}: {len(failed)} steps failed: {', '.join(failed)}")


def _header(plan: CampaignPlan, *, gpu: str | None, budget_s: float) -> CampaignHeader:
    from moe_bench.launch.environment import current_environment
    from moe_bench.results.calibration import CPU
    from moe_bench.results.campaign import CampaignHeader
    from moe_bench.results.provenance import git_state, installed_packages, job_id_here

    return CampaignHeader(
        is_tiny=plan.is_tiny,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        command=tuple(sys.argv),
        job_id=job_id_here(current_environment()),
        git=git_state(data_root()),
        packages=installed_packages(),
        gpu_name=gpu or CPU,
        driver_version=None if gpu is None else gpu_fact("driver_version"),
        budget_s=budget_s,
    )


def _journal(root: Path, here: CampaignHeader, *, resume: bool) -> CampaignJournal:
    """A new journal, or with `resume` the newest one of this GPU that is not finished."""
    from moe_bench.results.campaign import CampaignJournal, campaign_folder
    from moe_bench.results.journal import unfinished_journals

    unfinished = unfinished_journals(campaign_folder(root, here.gpu_name))
    begun = journal_to_resume(unfinished, resume=resume, what="campaign", gpu_name=here.gpu_name, root=root)
    return CampaignJournal.start(root, here) if begun is None else CampaignJournal.resume(begun, here)
