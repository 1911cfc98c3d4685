"""Puts the page together: what it shows, in which order, and what is missing from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from moe_bench.analysis.memory import memory_fit
from moe_bench.report.figures import TERA
from moe_bench.report.html.chart import Chart
from moe_bench.report.html.facts import Fact, packages_said_once, recipe_facts, row_sources, run_provenance
from moe_bench.report.html.job_drawing import JobDrawing, job_drawing
from moe_bench.report.html.memory_chart import memory_chart
from moe_bench.report.html.rendering import template
from moe_bench.report.html.run_charts import (
    load_chart,
    load_heatmap,
    peak_memory_chart,
    step_time_chart,
    worst_load_ratios,
)
from moe_bench.report.html.scaling_charts import scaling_charts
from moe_bench.report.html.throughput_chart import Line, throughput_chart, throughput_lines
from moe_bench.report.html.training_card import training_card
from moe_bench.report.recipe_list import parity_mark
from moe_bench.report.reproduce import Reproduction, reproductions
from moe_bench.report.reproduce_view import published_text, ratio_text, summary_line
from moe_bench.report.scaling import Curve, MissingPoint, ScalingPoint, scaling_of
from moe_bench.report.tables import run_rows, run_title, step_time_text
from moe_bench.results.parity import Parity, evidence_of
from moe_bench.results.published import PublishedRow
from moe_bench.results.record import Record
from moe_bench.results.summary import RunSummary, summary_of
from moe_bench.results.training_run import TrainingRun
from moe_bench.spec.recipe import Difference, Recipe
from moe_bench.spec.scale import Substitution

MAX_OVERVIEW_RUNS = 200
"""Lines of the table of runs; more belong into `moe-bench results`, which can choose among them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportData:
    """Everything that the page shows."""

    records: tuple[Record, ...]
    """Runs of which the newest of each recipe and scale is shown in full."""
    recipes: tuple[Recipe, ...]
    """At full size; a card each."""
    rows: tuple[PublishedRow, ...]
    """The registry."""
    version: str
    """Of moe_bench."""
    older: tuple[RunSummary, ...] = ()
    """Runs that stand in the tables and charts of many only."""
    missing: tuple[MissingPoint, ...] = ()
    """Runs that were asked for and left no number."""
    projected: tuple[ScalingPoint, ...] = ()
    """Of kind PROJECTED. One whose label is a recipe's name stands beside it on the throughput chart; those
    of equal family make scaling curves."""
    pipeline_pictures: Mapping[str, Chart] = field(default_factory=dict)
    """Which stage computes when, by `Recipe.name`: a bar per pass, time along x, pipeline ranks along y
    (report/html/pipeline_picture.py). Drawn on the recipe's card."""
    waterfalls: Mapping[str, Chart] = field(default_factory=dict)
    """Where the step time goes, by `Recipe.name`: a bar per term, time along x, terms along y, each bar
    beginning where the one before ends. Drawn on the recipe's card, behind the picture."""
    training: tuple[TrainingRun, ...] = ()
    """Runs of `train`; a card each, apart from the benchmark runs."""
    parities: tuple[Parity, ...] = ()
    """Comparisons of settings, newest first; runs without one are marked."""
    unprojected: Mapping[str, str] = field(default_factory=dict)
    """Why a recipe has no projection, by `Recipe.name`. A fact on its card."""

    @property
    def runs(self) -> tuple[RunSummary, ...]:
        """All runs in the order of their start."""
        found = (*map(summary_of, self.records), *self.older)
        return tuple(sorted(found, key=lambda run: run.started_at))


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One recipe."""

    title: str
    name: str
    facts: tuple[Fact, ...]
    differences: tuple[Difference, ...]
    drawing: JobDrawing
    charts: tuple[Chart, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPart:
    """One run in full."""

    title: str
    is_as_asked: bool
    facts: tuple[tuple[str, str], ...]
    charts: tuple[Chart, ...]
    substitutions: tuple[Substitution, ...]
    provenance: tuple[Fact, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Absence:
    """Something that the page would show, and why it does not."""

    what: str
    why: str


def render_page(data: ReportData) -> str:
    """The page as HTML: styles inside, no script, nothing fetched."""
    runs = data.runs
    lines = throughput_lines(data.recipes, data.rows, runs, data.projected)
    curves = model_curves(data, runs)
    projected = {one.label: one.tokens_per_s_per_gpu for one in data.projected}
    reproduced = reproductions(data.recipes, {row.id: row for row in data.rows}, runs, projected=projected)
    rows = rows_shown(data.rows, lines, curves)
    latest = latest_records(data.records)
    parts = [_run_part(index, record) for index, record in enumerate(latest)]
    provenance = packages_said_once((part.title, part.provenance) for part in parts)
    return template("page.html.j2").render(
        data=data,
        num_runs=len(runs),
        overview=[overview_row(run, data.parities) for run in runs[-MAX_OVERVIEW_RUNS:]],
        runs=parts,
        provenance=provenance,
        num_older=len(runs) - len(latest),
        training=[training_card(index, run) for index, run in enumerate(data.training)],
        throughput=throughput_chart("throughput", lines) if lines else None,
        verdict_line=summary_line(reproduced),
        verdicts=[verdict_row(one) for one in reproduced if one.scale == "full"],
        scaling=scaling_charts(curves, {one.model.key: one.model.display_name for one in data.recipes}),
        cards=[_card(data, index, recipe) for index, recipe in enumerate(data.recipes)],
        sources=row_sources(rows),
        num_rows=len(rows),
        absences=absences(data, runs, curves),
    )


def latest_records(records: Sequence[Record]) -> tuple[Record, ...]:
    """The newest record of every recipe, scale and change; full-scale ones first."""
    by_start = sorted(records, key=lambda record: record.provenance.started_at)
    newest = {
        (record.plan.scale != "full", record.plan.asked, record.plan.scale, record.plan.modified): record
        for record in by_start
    }
    return tuple(newest[key] for key in sorted(newest))


def model_curves(data: ReportData, runs: Sequence[RunSummary]) -> tuple[Curve, ...]:
    """Scaling curves of the models on the page."""
    models = {recipe.model.key: recipe.model for recipe in data.recipes}
    found = scaling_of(runs, data.rows, models, projected=data.projected, missing=data.missing)
    return tuple(curve for curve in found.curves if curve.subject.model in models)


def rows_shown(
    rows: Sequence[PublishedRow], lines: Sequence[Line], curves: Sequence[Curve]
) -> tuple[PublishedRow, ...]:
    """The published rows that stand on a chart."""
    ids = {number.row_id for line in lines for number in line.numbers}
    ids |= {one.point.label for curve in curves for one in curve.efficiencies}
    return tuple(row for row in rows if row.id in ids)


def absences(data: ReportData, runs: Sequence[RunSummary], curves: Sequence[Curve]) -> tuple[Absence, ...]:
    """What the page names instead of drawing."""
    no_projection = "no projection is among these results"
    candidates = (
        (
            any(run.plan.scale == "full" for run in runs),
            "Measured throughput at full scale",
            "none of these results is a full-scale run; `sbatch slurm/run_recipe.sh RECIPE` makes one",
        ),
        (
            any(worst_load_ratios(record) for record in data.records)
            or any(run.health for run in data.training),
            "Expert load",
            "none of these results counted tokens per expert",
        ),
        (
            bool(curves),
            "Weak and strong scaling",
            "no two results or rows of these models differ in size at equal batch, per GPU or in all",
        ),
        (bool(data.projected), "Projected throughput", no_projection),
        (bool(data.pipeline_pictures), "Pipeline picture: which stage computes when", no_projection),
        (bool(data.waterfalls), "Waterfall: where the step time goes", no_projection),
    )
    return tuple(Absence(what=what, why=why) for is_there, what, why in candidates if not is_there)


def overview_row(run: RunSummary, parities: Sequence[Parity]) -> dict[str, str]:
    """One line of the table of runs; the headings are equal for all."""
    metrics = run.metrics
    return {
        "run": run_title(run.plan),
        "started (UTC)": run.started_at[:16].replace("T", " "),
        "ranks": str(run.num_ranks),
        "step time, 95 %": step_time_text(metrics),
        "tokens/s per rank": f"{metrics.tokens_per_s_per_gpu:,.0f}",
        "TFLOPs per rank": f"{metrics.flops_per_s_per_gpu / TERA:.3g}",
        "MFU": "-" if metrics.mfu_fraction is None else f"{metrics.mfu_fraction:.1%}",
        "last loss": "-" if metrics.last_loss is None else f"{metrics.last_loss:.4f}",
        "parity": parity_mark(evidence_of(parities, run.plan)),
    }


def verdict_row(one: Reproduction) -> dict[str, str]:
    """One line of the table of verdicts."""
    ours = one.tokens_per_s_per_gpu
    return {
        "recipe": one.published.recipe,
        "published": published_text(one),
        "ours": "-" if ours is None else f"{ours:,.0f}",
        "ratio, 95 %": ratio_text(one),
        "verdict": str(one.verdict),
        "projected / published": "-" if one.projected_ratio is None else f"{one.projected_ratio:.2f}",
        "because": "; ".join(one.because) or "-",
    }


def _card(data: ReportData, index: int, recipe: Recipe) -> Card:
    row = next((row for row in data.rows if row.id == recipe.reproduces), None)
    charts = [] if recipe.system.gpu is None else [memory_chart(f"memory-{index}", memory_fit(recipe))]
    charts += [
        charts_by_name[recipe.name]
        for charts_by_name in (data.pipeline_pictures, data.waterfalls)
        if recipe.name in charts_by_name
    ]
    return Card(
        title=recipe.model.display_name,
        name=recipe.name,
        facts=(*recipe_facts(recipe, row), *_refusal(data, recipe)),
        differences=recipe.differences,
        drawing=job_drawing(f"layout-{index}", recipe),
        charts=tuple(charts),
    )


def _refusal(data: ReportData, recipe: Recipe) -> tuple[Fact, ...]:
    reason = data.unprojected.get(recipe.name)
    return () if reason is None else (Fact(label="not projected", text=reason),)


def _run_part(index: int, record: Record) -> RunPart:
    charts = [step_time_chart(f"steps-{index}", record), peak_memory_chart(f"peak-{index}", record)]
    if worst_load_ratios(record):
        charts += [load_heatmap(f"experts-{index}", record), load_chart(f"load-{index}", record)]
    return RunPart(
        title=run_title(record.plan),
        is_as_asked=record.plan.scale == "full" and not record.plan.modified,
        facts=tuple(run_rows(record)),
        charts=tuple(charts),
        substitutions=record.plan.substitutions,
        provenance=run_provenance(record),
    )
