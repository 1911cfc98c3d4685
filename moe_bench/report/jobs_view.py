"""Jobs as a list, and one of them with everything that is known about it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moe_bench.launch.job_state import JobState
from moe_bench.launch.jobs import JobReport
from moe_bench.report.columns import Columns


@dataclass(frozen=True, slots=True, kw_only=True)
class _JobTable:
    """A line per job, and below it one that says why it stands where it does."""

    reports: Sequence[JobReport]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = Columns(
            headings=("job", "state", "recipe", "ranks", "since (UTC)"),
            rows=tuple(
                (
                    report.id,
                    report.state,
                    job_title(report),
                    str(report.num_ranks),
                    report.started_at[:16].replace("T", " "),
                )
                for report in self.reports
            ),
            right=frozenset({"ranks"}),
        )
        lines = columns.lines(options.max_width if console.is_terminal else None)
        for head in lines.head:
            yield Text(head, style="bold", no_wrap=True, overflow="ignore")
        for line, report in zip(lines.body, self.reports, strict=True):
            yield Text(line, no_wrap=True, overflow="ignore")
            if report.reason:
                yield Padding(Text(report.reason, style="dim", overflow="fold"), (0, 0, 0, 4))
        if lines.missing:
            yield Text(lines.missing, style="dim")


def jobs_view(reports: Sequence[JobReport], *, num_hidden: int) -> RenderableType:
    """The jobs, the first line counting their states; `num_hidden` older ones are left out."""
    counts = Counter(report.state for report in reports)
    told = ", ".join(f"{counts[state]} {state}" for state in JobState if counts[state]) or "no jobs"
    older = f"; {num_hidden:,} older ones: --limit" if num_hidden else ""
    return Group(Text(told + older, style="bold"), *([_JobTable(reports=reports)] if reports else []))


def job_title(report: JobReport) -> str:
    """What the job runs, with every mark that keeps it from being mistaken for the recipe as asked."""
    marks = [f"{report.scale} scale"] if report.scale != "full" else []
    marks += report.modified
    marks += [f"repeat {report.repeat}"] if report.repeat else []
    return report.recipe + (f" ({', '.join(marks)})" if marks else "")


def job_view(report: JobReport) -> RenderableType:
    """One job in full."""
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for label, text in (
        ("job", report.id),
        ("state", report.state + (f": {report.reason}" if report.reason else "")),
        ("recipe", job_title(report)),
        ("size", report.job_size or f"{report.num_ranks} ranks"),
        ("since (UTC)", report.started_at),
        ("record", str(report.record or "none")),
        ("log", str(report.log or "none")),
        ("command", shlex.join(report.command) or "stands in the record"),
    ):
        table.add_row(label, text)
    return table


def job_json(report: JobReport) -> dict[str, object]:
    """Everything that is known of a job, as JSON."""
    return {
        "id": report.id,
        "state": report.state.value,
        "reason": report.reason,
        "recipe": report.recipe,
        "scale": report.scale,
        "modified": list(report.modified),
        "num_ranks": report.num_ranks,
        "repeat": report.repeat,
        "started_at": report.started_at,
        "job_size": report.job_size,
        "record": None if report.record is None else str(report.record),
        "log": None if report.log is None else str(report.log),
        "command": list(report.command),
    }
