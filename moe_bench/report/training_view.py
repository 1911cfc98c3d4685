"""A training run as people read it: its steps as they come, then where it has got to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.results.training_log import LogLine
from moe_bench.results.training_run import CHECKPOINTS, saved_steps
from moe_bench.spec.training import TrainingJob

PLAIN_LINES = 20
"""Lines that a long run writes into a log, beside those with a validation loss."""


def training_view(lines: Sequence[LogLine], folder: Path) -> RenderableType:
    """The steps with a validation loss, the last of them with the checkpoints."""
    rows = [
        (
            str(line.step),
            f"{line.loss:.4f}",
            f"{line.validation_loss:.4f}",
            f"{math.exp(line.validation_loss):.2f}",
            f"{line.learning_rate:.2e}",
        )
        for line in lines
        if line.validation_loss is not None
    ]
    kept = ", ".join(f"step-{step:07d}" for step in saved_steps(folder / CHECKPOINTS))
    return Group(
        Columns(
            headings=("step", "loss", "validation loss", "perplexity", "learning rate"), rows=tuple(rows)
        ),
        Text(f"checkpoints in {folder / CHECKPOINTS}: {kept or 'none'}"),
    )


def training_json(job: TrainingJob, lines: Sequence[LogLine], folder: Path) -> dict[str, object]:
    """A run as JSON, with every step; losses in nats per token."""
    return {
        "job": job.model_dump(mode="json"),
        "folder": str(folder),
        "checkpoint_steps": saved_steps(folder / CHECKPOINTS),
        "steps": [line.model_dump() for line in lines],
    }


@contextlib.contextmanager
def training_progress(
    job: TrainingJob, console: Console, *, is_alone: bool
) -> Iterator[Callable[[LogLine], None]]:
    """Follow the steps: with a bar where this process is alone on a terminal, else with plain lines."""
    if not (is_alone and console.is_terminal):
        yield _plain(job, console)
        return
    # no refresh thread: the ranks are forked from this process, and a fork must copy no other thread
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        auto_refresh=False,
        transient=True,
    ) as progress:
        bar = progress.add_task("starting", total=job.num_steps)
        progress.refresh()

        def on_line(line: LogLine) -> None:
            progress.update(bar, completed=line.step, description=f"loss {line.loss:.4f}", refresh=True)
            if line.validation_loss is not None:
                progress.console.print(_text(line, job), highlight=False)

        yield on_line


def _plain(job: TrainingJob, console: Console) -> Callable[[LogLine], None]:
    stride = max(1, job.num_steps // PLAIN_LINES)

    def on_line(line: LogLine) -> None:
        if line.step % stride == 0 or line.step == 1 or line.validation_loss is not None:
            console.print(_text(line, job), highlight=False)

    return on_line


def _text(line: LogLine, job: TrainingJob) -> str:
    validation = "" if line.validation_loss is None else f", validation {line.validation_loss:.4f}"
    return f"step {line.step}/{job.num_steps} loss {line.loss:.4f}{validation}"
