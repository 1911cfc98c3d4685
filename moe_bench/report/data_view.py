"""A dataset as people read it: how far its build is, and what it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from moe_bench.report.columns import Columns
from moe_bench.spec.dataset import DatasetManifest

PLAIN_LINES = 10
"""Lines that a long build writes into a log, evenly spaced."""


def manifest_view(manifest: DatasetManifest, prefix: Path) -> RenderableType:
    """Documents, tokens and the tokenizer."""
    tokenizer = manifest.tokenizer
    num_bytes = sum(source.num_bytes for source in manifest.sources)
    named = "one token per byte" if tokenizer.kind == "bytes" else str(tokenizer.path)
    rows = (
        ("dataset", f"{prefix}.bin, .idx and .json"),
        ("read", f"{len(manifest.sources)} files, {num_bytes:,} bytes"),
        ("documents", f"{manifest.num_documents:,} ({manifest.documents})"),
        ("tokens", f"{manifest.num_tokens:,}, with one behind each document"),
        ("tokenizer", f"{named}, vocabulary {tokenizer.vocab_size:,}"),
    )
    return Columns(headings=("", ""), rows=rows)


@contextlib.contextmanager
def bytes_progress(console: Console) -> Iterator[Callable[[int, int], None]]:
    """Follow the bytes that are done: with a bar on a terminal, else with a few plain lines."""
    if not console.is_terminal:
        yield _plain(console)
        return
    columns = (TextColumn("tokenizing"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=None)
        yield lambda done, total: progress.update(bar, completed=done, total=total)


def _plain(console: Console) -> Callable[[int, int], None]:
    seen = [0]

    def on_bytes(done: int, total: int) -> None:
        tenth = done * PLAIN_LINES // total if total else 0
        if tenth > seen[0]:
            seen[0] = tenth
            console.print(f"{done:,} of {total:,} bytes", highlight=False)

    return on_bytes
