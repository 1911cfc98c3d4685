"""Records as a list, and one of them with everything that it says about where and with what it was made."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.report.figures import TERA
from moe_bench.report.html.facts import run_provenance
from moe_bench.report.tables import run_view
from moe_bench.results.entry import Entry
from moe_bench.results.parity import Parity
from moe_bench.results.record import Record

Line = dict[str, str | int | float]
COLUMNS = (
    "id",
    "model",
    "recipe",
    "scale",
    "modified",
    "system",
    "precision",
    "num_ranks",
    "status",
    "started_at",
    "commit",
    "job_id",
    "repeat",
    "step_time_s",
    "tokens_per_s_per_gpu",
    "tflops_per_gpu",
    "path",
)


def entry_line(entry: Entry) -> Line:
    """What JSON and CSV say of a record."""
    said = {column: getattr(entry, column) for column in COLUMNS if column != "tflops_per_gpu"}
    shown = {
        "modified": " ".join(entry.modified),
        "tflops_per_gpu": entry.flops_per_s_per_gpu / TERA,
        "path": str(entry.path),
    }
    return {column: (said | shown)[column] for column in COLUMNS}


def entries_csv(entries: Sequence[Entry]) -> str:
    """The list, unrounded."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(map(entry_line, entries))
    return text.getvalue()


def entries_view(entries: Sequence[Entry], *, num_found: int) -> RenderableType:
    """The list for a terminal; the id says start, commit and job. `num_found` counts those left out, too."""
    table = Columns(
        headings=("id", "recipe", "scale", "status", "ranks", "step s", "tokens/s/GPU", "TFLOPs/GPU"),
        rows=tuple(
            (
                entry.id,
                entry.recipe,
                entry.scale + (" modified" if entry.modified else ""),
                entry.status,
                str(entry.num_ranks),
                f"{entry.step_time_s:.4g}",
                f"{entry.tokens_per_s_per_gpu:,.4g}",
                f"{entry.flops_per_s_per_gpu / TERA:.4g}",
            )
            for entry in entries
        ),
        right=frozenset({"ranks", "step s", "tokens/s/GPU", "TFLOPs/GPU"}),
    )
    hidden = num_found - len(entries)
    more = f"; {hidden:,} older ones: --limit, or ask for fewer" if hidden else ""
    return Group(table, Text(f"{num_found:,} record{'' if num_found == 1 else 's'}{more}", style="dim"))


def record_view(record: Record, entry: Entry, parities: Sequence[Parity]) -> RenderableType:
    """One record: its numbers as after the run, and its provenance; `parities` as in `run_view`."""
    table = Table(box=None, pad_edge=False, show_header=False, title="provenance", title_justify="left")
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    for fact in run_provenance(record):
        table.add_row(fact.label, fact.text)
    return Group(run_view(record, entry.path, parities=parities), Text(), table)
