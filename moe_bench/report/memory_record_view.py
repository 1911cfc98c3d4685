"""What `accuracy --memory` prints: verdicts on runs that ran, printed peaks, and runs that failed."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.analysis.memory_verdict import MemoryVerdict
from moe_bench.projection.accuracy.memory import TOLERANCE_FRACTION, JudgedRow, MemoryRecord
from moe_bench.report.columns import Columns
from moe_bench.report.figures import GIB


def memory_record_view(record: MemoryRecord) -> RenderableType:
    """Tables for people."""
    parts: list[RenderableType] = [Text(line) for line in memory_sentences(record)]
    for title, columns in memory_tables(record).items():
        parts += [Text(), Text(title, style="bold"), columns]
    return Group(*parts)


def memory_sentences(record: MemoryRecord) -> Sequence[str]:
    """What the record says in sum, a sentence each."""
    counts = record.counts
    found = ", ".join(f"{counts[verdict]} {verdict}" for verdict in MemoryVerdict)
    peaks, failed = record.peaks, record.failed
    return (
        f"{len(record.ran)} published runs: {found} ({record.too_close_fraction:.1%})",
        f"{record.num_peaks_met} of {len(peaks)} printed peaks within {TOLERANCE_FRACTION:.0%}",
        f"{len(failed)} runs known to have run out of memory: {len(record.missed)} called fitting, "
        f"{len(record.unjudged)} more without a printed layout",
    )


def memory_tables(record: MemoryRecord) -> dict[str, Columns]:
    """Every row that a reader would ask about, by title; tables without rows are left out."""
    tables = {
        "ran, and called not fitting": _rows_table(record.impossible),
        "ran out of memory": _rows_table(record.failed),
        "judged as they ran, not as they are recorded": _corrections_table(record),
        "printed peaks": _peaks_table(record.peaks),
    }
    return {title: columns for title, columns in tables.items() if columns.rows}


def memory_record_markdown(record: MemoryRecord) -> str:
    """The same tables for docs/memory_accuracy.md."""
    blocks = ["\n".join(f"- {line}." for line in memory_sentences(record))]
    for title, columns in memory_tables(record).items():
        lines = [
            columns.headings,
            tuple("--:" if one in columns.right else "---" for one in columns.headings),
        ]
        table = "\n".join(f"| {' | '.join(cells)} |" for cells in (*lines, *columns.rows))
        blocks.append(f"{title[0].upper()}{title[1:]}:\n\n{table}")
    return "\n\n".join(blocks)


def memory_record_json(record: MemoryRecord) -> dict[str, object]:
    """`memory_record_view` as JSON, every judged row included."""
    return {
        "num_ran": len(record.ran),
        "num_by_verdict": {str(verdict): record.counts[verdict] for verdict in MemoryVerdict},
        "too_close_fraction": record.too_close_fraction,
        "num_peaks": len(record.peaks),
        "num_peaks_met": record.num_peaks_met,
        "peak_tolerance_fraction": TOLERANCE_FRACTION,
        "num_failed": len(record.failed),
        "num_failed_called_fitting": len(record.missed),
        "failed_without_layout": [{"id": one.row.id, "reason": one.reason} for one in record.unjudged],
        "left_out": [
            {"rows": list(one.rows), "cause": one.cause, "source": one.source} for one in record.silent
        ],
        "ran": [_row_json(row) for row in record.ran],
        "failed": [_row_json(row) for row in record.failed],
    }


def _row_json(row: JudgedRow) -> dict[str, object]:
    memory = row.memory
    return {
        "id": row.run.row.id,
        "verdict": str(row.verdict),
        "held_bytes": memory.held_bytes,
        "reserved_bytes": memory.reserved_bytes,
        "needed_bytes": memory.needed_bytes,
        "usable_bytes": memory.usable_bytes,
        "pipeline_rank": memory.pipeline_rank,
        "peak_at": memory.peak_at,
        "printed_bytes": row.printed_bytes,
        "peak_error_fraction": row.peak_error,
        "correction": None if row.correction is None else row.correction.cause,
    }


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.1f}"


def _rows_table(rows: Sequence[JudgedRow]) -> Columns:
    return Columns(
        headings=("run", "verdict", "held (GiB)", "at most", "usable", "fullest in"),
        rows=tuple(
            (
                row.run.row.id,
                str(row.verdict),
                _gib(row.memory.held_bytes),
                _gib(row.memory.needed_bytes),
                _gib(row.memory.usable_bytes),
                row.memory.peak_at,
            )
            for row in rows
        ),
        right=frozenset(("held (GiB)", "at most", "usable")),
        is_stacked=True,
    )


def _corrections_table(record: MemoryRecord) -> Columns:
    return Columns(
        headings=("run", "verdict", "why"),
        rows=tuple(
            (row.run.row.id, str(row.verdict), row.correction.cause)
            for row in record.ran
            if row.correction is not None
        ),
        is_stacked=True,
    )


def _peaks_table(rows: Sequence[JudgedRow]) -> Columns:
    ordered = sorted(rows, key=lambda row: -abs(row.peak_error or 0.0))
    return Columns(
        headings=("run", "printed (GiB)", "projected", "error", "of which"),
        rows=tuple(
            (
                row.run.row.id,
                _gib(row.printed_bytes or 0),
                _gib(row.projected_bytes),
                f"{row.peak_error or 0.0:+.1%}",
                "reserved" if row.is_reserved else "allocated",
            )
            for row in ordered
        ),
        right=frozenset(("printed (GiB)", "projected", "error")),
        is_stacked=True,
    )
