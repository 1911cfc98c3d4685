"""A campaign as people read it: what would be measured, what is being measured, and what came of it."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Callable, Iterator

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from moe_bench.projection.campaign.plan import CampaignPlan, PlannedStep
from moe_bench.report.columns import Columns
from moe_bench.report.figures import GIB
from moe_bench.results.campaign import Campaign, Step, StepOutcome

Seen = tuple[Callable[[Step, float], None], Callable[[StepOutcome], None]]
"""Called before a step with its estimated seconds, and after it with what came of it."""


def campaign_plan_view(plan: CampaignPlan) -> RenderableType:
    """Every step in the order in which they run, the most valuable first, then sums and what is left out."""
    headings = ("#", "step", "s", "GiB", "command", "tells")
    rows = tuple(_plan_row(number, one) for number, one in enumerate(plan.steps, start=1))
    notes = tuple(Text(line) for line in _notes(plan))
    return Group(Columns(headings=headings, rows=rows, right=frozenset({"#", "s", "GiB"})), Text(), *notes)


def _plan_row(number: int, one: PlannedStep) -> tuple[str, ...]:
    memory = "-" if one.memory_bytes is None else f"{one.memory_bytes / GIB:.1f}"
    name = f"{one.step.key} (not here)" if one.absent else one.step.key
    return (str(number), name, f"{one.estimated_s:.0f}", memory, _command(one.step), one.step.question)


def _command(step: Step) -> str:
    return shlex.join((step.program, *step.arguments))


def _notes(plan: CampaignPlan) -> Iterator[str]:
    gpu = plan.system.gpu
    name = gpu.device_name if gpu is not None else plan.system.key
    how = "toys on this machine, by a rough rate" if plan.is_tiny else f"by the projection for {name}"
    yield f"estimated {plan.estimated_s / 60:.1f} min: {how}; no estimate has met a GPU yet"
    for one in plan.steps:
        if one.absent:
            yield f"{one.step.key}: {one.absent}"
    for one in plan.over_budget:
        yield f"{one.step.key}: its {one.estimated_s:.0f} s do not fit the budget"


def campaign_plan_json(plan: CampaignPlan) -> dict[str, object]:
    """`campaign_plan_view` as JSON, in seconds and bytes."""
    return {
        "system": plan.system.key,
        "is_tiny": plan.is_tiny,
        "estimated_s": plan.estimated_s,
        "steps": [_step_json(one) for one in plan.steps],
        "over_budget": [_step_json(one) for one in plan.over_budget],
    }


def _step_json(one: PlannedStep) -> dict[str, object]:
    return {
        **one.step.model_dump(mode="json"),
        "estimated_s": one.estimated_s,
        "memory_bytes": one.memory_bytes,
        "absent": one.absent,
    }


def campaign_view(campaign: Campaign) -> RenderableType:
    """What came of every step, and the files that hold the measurements."""
    headings = ("step", "result", "s", "files, or the reason")
    rows = tuple(_outcome_row(outcome) for outcome in campaign.outcomes)
    num_done = sum(outcome.is_done for outcome in campaign.outcomes)
    total_s = sum(outcome.wall_s for outcome in campaign.outcomes)
    line = f"{num_done} of {len(rows)} steps measured on {campaign.header.gpu_name} in {total_s / 60:.1f} min"
    return Group(Columns(headings=headings, rows=rows, right=frozenset({"s"})), Text(), Text(line))


def _outcome_row(outcome: StepOutcome) -> tuple[str, ...]:
    if outcome.is_done:
        return (outcome.step.key, "done", f"{outcome.wall_s:.0f}", ", ".join(outcome.files) or "-")
    result = "not started" if outcome.exit_code is None else f"exit code {outcome.exit_code}"
    return (outcome.step.key, result, f"{outcome.wall_s:.0f}", outcome.reason or "-")


def campaign_json(campaign: Campaign, path: str) -> dict[str, object]:
    """`campaign_view` as JSON, with the path of the campaign's own file."""
    return {"path": path, **campaign.model_dump(mode="json")}


@contextlib.contextmanager
def campaign_progress(num_steps: int, num_done: int, console: Console) -> Iterator[Seen]:
    """Follow the steps: with a bar on a terminal, else with a plain line for each."""
    if not console.is_terminal:
        yield _plain(console)
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    ) as progress:
        bar = progress.add_task("starting", total=num_steps, completed=num_done)

        def started(step: Step, estimated_s: float) -> None:
            progress.update(bar, description=f"{step.key} (about {estimated_s:.0f} s)")

        def ended(outcome: StepOutcome) -> None:
            if not outcome.is_done:
                progress.console.print(_line(outcome), highlight=False)
            progress.advance(bar)

        yield started, ended


def _plain(console: Console) -> Seen:
    def ended(outcome: StepOutcome) -> None:
        console.print(_line(outcome), highlight=False)

    return (lambda step, estimated_s: None), ended


def _line(outcome: StepOutcome) -> str:
    _, result, _, reason = _outcome_row(outcome)
    said = "" if outcome.is_done else f": {reason}"
    return f"{outcome.step.key}: {result} after {outcome.wall_s:.0f} s{said}"
