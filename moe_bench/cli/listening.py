"""What a person sees while many records are read: the files that were skipped, and how far it has come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import typer
from rich.progress import Progress

from moe_bench.cli.options import make_console
from moe_bench.results.reading import Listener

MAX_SKIPPED_SHOWN = 10


@contextmanager
def listening(*, on_skipped: Callable[[str], None] | None = None) -> Iterator[Listener]:
    """A listener that writes to standard error; `on_skipped` takes the skipped files in its stead."""
    skipped: list[str] = []
    console = make_console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading records", visible=False)

        def on_progress(num_done: int, num_files: int) -> None:
            progress.update(task, completed=num_done, total=num_files, visible=num_done < num_files)

        yield Listener(
            on_skipped=on_skipped or skipped.append,
            on_note=lambda line: typer.echo(line, err=True),
            on_progress=on_progress,
        )
    for problem in skipped[:MAX_SKIPPED_SHOWN]:
        typer.echo(f"skipped {problem}", err=True)
    if len(skipped) > MAX_SKIPPED_SHOWN:
        typer.echo(f"skipped {len(skipped) - MAX_SKIPPED_SHOWN} more: moe-bench results check", err=True)
