"""The verb about jobs: list, show, log and cancel them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import RUN, app
from moe_bench.cli.options import JsonOption, print_view, results_root
from moe_bench.errors import BadInputError, SchedulerError

if TYPE_CHECKING:
    from moe_bench.launch.jobs import JobReport, Jobs

DEFAULT_LIMIT = 30

jobs_app = typer.Typer()
app.add_typer(jobs_app, name="jobs", rich_help_panel=RUN)

ResultsOption = Annotated[
    Path | None, typer.Option("--results", help="The folder that the jobs write to; default: results/.")
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Job, as listed.")]


@jobs_app.callback(invoke_without_command=True)
def jobs(
    context: typer.Context,
    results: ResultsOption = None,
    state: Annotated[
        str | None, typer.Option("--state", help="submitted, running, failed, 'out of memory', ...")
    ] = None,
    limit: Annotated[
        int, typer.Option("--limit", min=1, help="Number of jobs, the newest first.")
    ] = DEFAULT_LIMIT,
    as_json: JsonOption = False,
) -> None:
    """List what was submitted or run here and what became of it, newest first."""
    context.obj = results or results_root()
    if context.invoked_subcommand is not None:
        return
    from moe_bench.launch.job_state import JobState
    from moe_bench.report.jobs_view import job_json, jobs_view
    from moe_bench.spec.load import UnknownNameError

    if state is not None and state not in set(JobState):
        raise UnknownNameError("state of a job", state, [known.value for known in JobState])
    found = [report for report in _jobs(context.obj).reports if state in (None, report.state)]
    shown = found[:limit]
    view = jobs_view(shown, num_hidden=len(found) - len(shown))
    print_view(view, [job_json(report) for report in shown], as_json)


@jobs_app.command()
def show(
    context: typer.Context, job_id: IdArgument, results: ResultsOption = None, as_json: JsonOption = False
) -> None:
    """Show one job: where it stands, why, its record, its log and the command that queued it."""
    from moe_bench.report.jobs_view import job_json, job_view

    report = _job(results or context.obj, job_id)
    print_view(job_view(report), job_json(report), as_json)


@jobs_app.command()
def log(
    context: typer.Context,
    job_id: IdArgument,
    results: ResultsOption = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Stay, and print new lines as they come.")
    ] = False,
) -> None:
    """Print the log of a job."""
    from moe_bench.launch.runner import run_live

    report = _job(results or context.obj, job_id)
    if report.log is None:
        why = (
            "it has printed nothing yet" if report.command and report.job_size else "only its record is left"
        )
        raise BadInputError(f"job {report.id} has no log: it is {report.state}, {why}")
    raise typer.Exit(run_live(("tail", "-n", "+1", *(["-F"] if follow else []), str(report.log))))


@jobs_app.command()
def cancel(context: typer.Context, job_id: IdArgument, results: ResultsOption = None) -> None:
    """End a job that waits or runs."""
    from moe_bench.launch.local_runs import cancel_local
    from moe_bench.launch.runner import run_captured

    report = _job(results or context.obj, job_id)
    if report.state.has_ended:
        raise BadInputError(f"job {report.id} is {report.state}: there is nothing to cancel")
    if report.process_id is not None:
        cancel_local(results or context.obj, report.process_id)
    elif report.id.isdigit():
        done = run_captured(("scancel", report.id))
        if done.returncode:
            raise SchedulerError(done.stderr.strip())
    else:
        raise BadInputError(f"job {report.id}: {report.reason}; cancel it there")
    typer.echo(f"cancelled job {report.id}: {report.recipe}")


def _jobs(root: Path) -> Jobs:
    from moe_bench.cli.listening import listening
    from moe_bench.launch.jobs import all_jobs
    from moe_bench.launch.runner import run_captured
    from moe_bench.results.reading import read_entries

    with listening() as listener:
        entries = tuple(read_entries((root,), listener)) if root.is_dir() else ()
    found = all_jobs(root, entries, run=run_captured)
    for problem in found.problems:
        typer.echo(f"{problem}; what it would know is missing below", err=True)
    return found


def _job(root: Path, job_id: str) -> JobReport:
    from moe_bench.spec.load import UnknownNameError

    reports = _jobs(root).reports
    number = job_id.removeprefix("job")
    found = [report for report in reports if report.id == number]
    found = found or [report for report in reports if report.id == f"pid{number}"]
    if not found:
        raise UnknownNameError("job", job_id, list(dict.fromkeys(report.id for report in reports)))
    return found[0]
