"""The table of one run, for the terminal and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_bench.report.figures import GIB, TERA
from moe_bench.report.parity_view import evidence_line
from moe_bench.report.recipe_list import layout_label
from moe_bench.report.show import substitution_table
from moe_bench.report.slice_view import slice_json, slice_rows
from moe_bench.results.metrics import COUNTING, RunMetrics, max_over_mean_load_ratio, run_metrics
from moe_bench.results.parity import Parity, evidence_of
from moe_bench.results.record import Record
from moe_bench.spec.scale import Plan

MAX_OUTLIERS_SHOWN = 5


def run_view(
    record: Record,
    path: Path,
    *,
    parities: Sequence[Parity] = (),
    dry_run_peak_bytes: int | None = None,
    was_announced: bool = False,
) -> RenderableType:
    """The numbers of one run, what was substituted, which kernels ran, and where the record lies.

    `parities` are comparisons of settings, newest first; `dry_run_peak_bytes` is that of a slice's rank,
    where it was asked for; `was_announced` where the reader has the substitutions on the screen already.
    """
    plan = record.plan
    parts: list[RenderableType] = []
    if plan.substitutions and not was_announced:
        parts += [substitution_table(plan.substitutions), Text()]
    table = Table(box=None, pad_edge=False, show_header=False, title=run_title(plan), title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    for label, value in run_rows(record, dry_run_peak_bytes=dry_run_peak_bytes):
        table.add_row(label, value)
    table.add_row("parity", evidence_line(evidence_of(parities, plan), plan))
    parts += [table, Text(f"record: {path}", style="dim")]
    return Group(*parts)


def run_line(record: Record, path: Path) -> RenderableType:
    """A repeat of a run whose table was just shown: its step time and its file."""
    metrics = run_metrics(record)
    steps = steps_text(metrics, len(record.samples.step_times_s[0]))
    number = record.provenance.repeat + 1
    return Group(
        Text(f"run {number}: step time {step_time_text(metrics)}, {steps}"),
        Text(f"record: {path}", style="dim"),
    )


def run_title(plan: Plan) -> str:
    """What ran, with every mark that keeps it from being mistaken for the full recipe."""
    marks = [f"{plan.scale} scale"] if plan.scale != "full" else []
    if plan.modified:
        marks.append(f"modified: {', '.join(plan.modified)}")
    return plan.asked + (f" ({'; '.join(marks)})" if marks else "")


def run_rows(record: Record, *, dry_run_peak_bytes: int | None = None) -> list[tuple[str, str]]:
    """Label and text of each number, in the order of the table; `dry_run_peak_bytes` as in `run_view`."""
    metrics, recipe, samples = run_metrics(record), record.plan.recipe, record.samples
    unit = "process" if recipe.system.gpu is None else "GPU"
    mfu = (
        "none: no peak is known for this machine"
        if metrics.mfu_fraction is None
        else f"{metrics.mfu_fraction:.1%}"
    )
    load = max_over_mean_load_ratio(record)
    energy_j = metrics.energy_per_token_j
    used, traces = samples.implementations, record.provenance.traces
    return [
        (
            "ran on",
            f"{_counted(record.num_ranks, unit)}, {layout_label(recipe) or 'DP1'}",
        ),
        *slice_rows(record, dry_run_peak_bytes=dry_run_peak_bytes),
        ("step time", f"{step_time_text(metrics)}, {steps_text(metrics, len(samples.step_times_s[0]))}"),
        *outlier_rows(record, metrics),
        ("tokens/s", f"{metrics.tokens_per_s:,.0f} ({metrics.tokens_per_s_per_gpu:,.0f} per {unit})"),
        (f"TFLOPs/{unit}", f"{metrics.flops_per_s_per_gpu / TERA:.4g} (counted: {COUNTING})"),
        ("MFU", mfu),
        ("loss", _loss_text(metrics)),
        ("peak memory", f"{metrics.peak_memory_bytes / GIB:.2f} GiB (rank {metrics.peak_memory_rank})"),
        ("energy", "not counted" if energy_j is None else f"{energy_j:.3g} J per token"),
        ("slowest rank", f"{metrics.slowest_rank} on {metrics.slowest_host}"),
        (
            "expert load",
            "no experts" if load is None else f"busiest {load:.2f} x mean ({recipe.routing.mode})",
        ),
        ("kernels", f"attention {used.attention}, experts {used.experts}, dispatch {used.dispatcher}"),
        ("optimizer", used.optimizer),
        ("patches", ", ".join(samples.patches) or "none"),
        *([("traces", ", ".join(traces))] if traces else []),
    ]


def _loss_text(metrics: RunMetrics) -> str:
    if metrics.first_loss is None or metrics.last_loss is None:
        return "none: the last pipeline stage has it"
    return f"{metrics.first_loss:.4f} -> {metrics.last_loss:.4f}"


def _counted(num: int, unit: str) -> str:
    plural = "es" if unit == "process" else "s"
    return f"{num} {unit}{'' if num == 1 else plural}"


def step_time_text(metrics: RunMetrics) -> str:
    """Median and 95 % interval in the unit that reads best."""
    scale, unit = (1.0, "s") if metrics.step_time_s >= 1 else (1e3, "ms")
    low, high = metrics.step_time_low_s * scale, metrics.step_time_high_s * scale
    return f"{metrics.step_time_s * scale:.4g} {unit} ({low:.4g} to {high:.4g})"


def steps_text(metrics: RunMetrics, num_timed: int) -> str:
    """Which steps the median is of."""
    if metrics.has_settled is None:
        return f"median of {num_timed} steps, too few to tell whether it is steady"
    if not metrics.has_settled:
        return f"median of {num_timed} steps, which drift: NOT STEADY"
    if not metrics.first_steady_step:
        return f"median of {num_timed} steps, steady from the first"
    num_steady = num_timed - metrics.first_steady_step
    return f"median of {num_steady} of {num_timed} steps, steady from step {metrics.first_steady_step + 1}"


def outlier_rows(record: Record, metrics: RunMetrics) -> list[tuple[str, str]]:
    """The counted steps that lie far from the median, with their times; none where there are none."""
    times_s = record.slowest_step_times_s()
    counted = [step for step in metrics.outlier_steps if step >= metrics.first_steady_step]
    shown = [f"{step + 1}: {times_s[step]:.4g} s" for step in counted[:MAX_OUTLIERS_SHOWN]]
    num_hidden = len(counted) - len(shown)
    shown += [f"and {num_hidden} more"] if num_hidden else []
    return [("outlier steps", f"{', '.join(shown)} (counted)")] if shown else []


def run_json(record: Record, path: Path, *, dry_run_peak_bytes: int | None = None) -> dict[str, object]:
    """`run_view` as JSON, with the units in the names."""
    return {
        "recipe": record.plan.asked,
        "scale": record.plan.scale,
        "modified": list(record.plan.modified),
        "num_ranks": record.num_ranks,
        "is_compute_of_one_rank": record.plan.is_slice,
        "slice": slice_json(record, dry_run_peak_bytes=dry_run_peak_bytes),
        **dataclasses.asdict(run_metrics(record)),
        "max_over_mean_load_ratio": max_over_mean_load_ratio(record),
        "flops_counting": str(COUNTING),
        "substitutions": [row.model_dump() for row in record.plan.substitutions],
        "implementations": record.samples.implementations.model_dump(),
        "traces": [str(path.with_name(name)) for name in record.provenance.traces],
        "record": str(path),
    }
