"""Many records as one table: terminal, Markdown and CSV."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.report.figures import GIB, TERA
from moe_bench.report.parity_view import marks_notes
from moe_bench.report.recipe_list import layout_label, parity_mark
from moe_bench.results.parity import Parity, evidence_of
from moe_bench.results.summary import Run, summary_of

COLUMNS = (
    "recipe",
    "scale",
    "modified",
    "ranks",
    "layout",
    "precision",
    "step_time_s",
    "step_time_low_s",
    "step_time_high_s",
    "tokens_per_s_per_gpu",
    "tflops_per_gpu",
    "mfu_pct",
    "peak_memory_gib",
    "loss",
    "num_substitutions",
    "started_at",
    "commit",
    "parity",
)

_TERMINAL = {
    "recipe": "recipe",
    "scale": "scale",
    "ranks": "ranks",
    "step_time_s": "step s",
    "tokens_per_s_per_gpu": "tokens/s/GPU",
    "tflops_per_gpu": "TFLOPs/GPU",
    "mfu_pct": "MFU %",
    "peak_memory_gib": "peak GiB",
    "layout": "layout",
    "loss": "loss",
    "precision": "precision",
    "started_at": "started",
    "num_substitutions": "subst.",
    "parity": "parity",
    "modified": "changes",
}
"""Columns of the terminal's table and their headings; `subst.` counts what a run substituted."""


def records_frame(runs: Sequence[Run], parities: Sequence[Parity] = ()) -> pd.DataFrame:
    """One row per run, by recipe and start; `parities` are comparisons of settings, newest first."""
    rows = [_row(run, parities) for run in runs]
    frame = pd.DataFrame(rows, columns=list(COLUMNS))
    return frame.sort_values(["recipe", "scale", "started_at"], ignore_index=True)


def _row(run: Run, parities: Sequence[Parity]) -> dict[str, object]:
    summary = summary_of(run)
    metrics, plan = summary.metrics, summary.plan
    return {
        "recipe": plan.asked,
        "scale": plan.scale,
        "modified": " ".join(plan.modified),
        "ranks": summary.num_ranks,
        "layout": layout_label(plan.recipe),
        "precision": plan.recipe.precision,
        "step_time_s": metrics.step_time_s,
        "step_time_low_s": metrics.step_time_low_s,
        "step_time_high_s": metrics.step_time_high_s,
        "tokens_per_s_per_gpu": metrics.tokens_per_s_per_gpu,
        "tflops_per_gpu": metrics.flops_per_s_per_gpu / TERA,
        "mfu_pct": None if metrics.mfu_fraction is None else metrics.mfu_fraction * 100,
        "peak_memory_gib": metrics.peak_memory_bytes / GIB,
        "loss": metrics.last_loss,
        "num_substitutions": len(plan.substitutions),
        "started_at": summary.started_at,
        "commit": summary.commit,
        "parity": parity_mark(evidence_of(parities, plan)),
    }


def as_csv(frame: pd.DataFrame) -> str:
    """The whole table, unrounded."""
    return str(frame.to_csv(index=False))


def as_markdown(frame: pd.DataFrame) -> str:
    """The table for a README."""
    lines = ["| " + " | ".join(frame.columns) + " |", "|" + "---|" * len(frame.columns)]
    lines += [
        "| " + " | ".join(_text(value) for value in row) + " |" for row in frame.itertuples(index=False)
    ]
    return "\n".join(lines)


def frame_view(frame: pd.DataFrame) -> RenderableType:
    """The table for a terminal: fewer columns, shorter headings, and what the marks of parity mean.

    A sentence where there is no record.
    """
    if frame.empty:
        return Text("no record there; `moe-bench run RECIPE` and `moe-bench submit RECIPE` write them")
    shown = {
        column: heading
        for column, heading in _TERMINAL.items()
        if column != "modified" or frame[column].any()
    }
    table = Columns(
        headings=tuple(shown.values()),
        rows=tuple(tuple(map(_text, row)) for row in frame[list(shown)].itertuples(index=False, name=None)),
        right=frozenset(
            heading for column, heading in shown.items() if pd.api.types.is_numeric_dtype(frame[column])
        ),
    )
    return Group(table, *(Text(note, style="dim") for note in marks_notes(frame["parity"])))


def _text(value: object) -> str:
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
