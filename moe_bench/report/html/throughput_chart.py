"""Tokens per second and GPU of every recipe: its published row, the rows beside it, our runs, projections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from moe_bench.analysis.equivalence import ratio_to_value
from moe_bench.report.html.axis import Axis, Place, log_ticks, logarithmic, ticks
from moe_bench.report.html.chart import (
    BOTTOM_PX,
    RIGHT_PX,
    TOP_PX,
    Chart,
    Data,
    Mark,
    Note,
    Shape,
    Stroke,
    legend_of,
)
from moe_bench.report.scaling import Kind, ScalingPoint, Subject, recipe_subject
from moe_bench.results.likeness import run_sets
from moe_bench.results.metrics import mean_tokens_per_s_per_gpu
from moe_bench.results.published import PublishedRow, model_key
from moe_bench.results.renormalised import Basis, renormalised
from moe_bench.results.summary import Run
from moe_bench.spec.recipe import Recipe

LEFT_PX = 18
ROW_PX = 34
ROLES = {
    "context": "published: other rows of that model, GPU, precision and length",
    "published": "published: the row that the recipe copies",
    "projected": "projected",
    "measured": "measured at full scale, with its 95 % interval",
}
"""What each look stands for; later ones lie on top."""
_SHAPES: dict[str, Shape] = {
    "context": "tick", "published": "square", "projected": "diamond", "measured": "dot",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """One number beside a recipe."""

    role: str
    """Key of ROLES."""
    label: str
    tokens_per_s_per_gpu: float
    row_id: str | None = None
    """Of a published one."""
    low_tokens_per_s: float | None = None
    high_tokens_per_s: float | None = None
    """Ends of the 95 % interval, per GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A recipe and its numbers."""

    name: str
    numbers: tuple[Throughput, ...]


def throughput_lines(
    recipes: Iterable[Recipe],
    rows: Sequence[PublishedRow],
    runs: Sequence[Run],
    projected: Sequence[ScalingPoint],
) -> tuple[Line, ...]:
    """The recipes for which there is any number; only full-scale runs without changes are theirs."""
    lines = []
    for recipe in recipes:
        numbers = (
            *_published(recipe, rows),
            *(
                Throughput(
                    role="projected", label=point.label, tokens_per_s_per_gpu=point.tokens_per_s_per_gpu
                )
                for point in projected
                if point.kind is Kind.PROJECTED and point.label == recipe.name
            ),
            *_measured(recipe, runs),
        )
        if numbers:
            lines.append(Line(name=recipe.name, numbers=numbers))
    return tuple(lines)


def _published(recipe: Recipe, rows: Iterable[PublishedRow]) -> Iterable[Throughput]:
    subject = recipe_subject(recipe)
    for row in rows:
        is_own = row.id == recipe.reproduces
        is_beside = subject == Subject(
            model=model_key(row.model),
            system=row.hardware or "",
            precision=row.precision or "",
            seq_len=row.seq_len or 0,
        )
        if not is_own and (not is_beside or row.num_layers not in (None, recipe.model.num_layers)):
            continue
        ours = renormalised(row, recipe.model)
        if ours.tokens_per_s_per_gpu is not None and row.is_training:
            is_printed = ours.basis in (Basis.PRINTED, Basis.STEP_TIME)
            yield Throughput(
                role="published" if is_own else "context",
                label=row.id if is_printed else f"{row.id} (from {ours.basis})",
                tokens_per_s_per_gpu=ours.tokens_per_s_per_gpu,
                row_id=row.id,
            )


def _measured(recipe: Recipe, runs: Iterable[Run]) -> Iterable[Throughput]:
    asked = (recipe.name, "full", ())
    for one in run_sets(run for run in runs if (run.plan.asked, run.plan.scale, run.plan.modified) == asked):
        runs_s = [run.gpu_s_per_token for run in one.runs]
        mean = mean_tokens_per_s_per_gpu(runs_s)
        ratio = ratio_to_value(runs_s, value_s=1 / mean)
        num_runs = len(one.runs)
        yield Throughput(
            role="measured",
            label=f"{num_runs} run{'s' if num_runs > 1 else ''} from {one.runs[0].started_at}",
            tokens_per_s_per_gpu=mean,
            low_tokens_per_s=None if ratio is None else mean * ratio.low_ratio,
            high_tokens_per_s=None if ratio is None else mean * ratio.high_ratio,
        )


def throughput_chart(key: str, lines: Sequence[Line]) -> Chart:
    """All numbers on one logarithmic axis, a line per recipe. Raises ValueError where there is none."""
    every = [number for line in lines for number in line.numbers]
    values = log_ticks(
        min(number.low_tokens_per_s or number.tokens_per_s_per_gpu for number in every),
        max(number.high_tokens_per_s or number.tokens_per_s_per_gpu for number in every),
    )
    x = logarithmic(values[0], values[-1], start_px=LEFT_PX + 8, end_px=RIGHT_PX - 8)
    heights_px = [TOP_PX + ROW_PX * row + 24 for row in range(len(lines))]
    marks = [
        _mark(number, x, y_px)
        for role in ROLES
        for line, y_px in zip(lines, heights_px, strict=True)
        for number in line.numbers
        if number.role == role
    ]
    return Chart(
        key=key,
        title="Throughput by recipe",
        caption="One line per recipe. The axis is logarithmic: equal distances are equal ratios.",
        height_px=TOP_PX + ROW_PX * len(lines) + 8 + BOTTOM_PX,
        left_px=LEFT_PX,
        x=Axis(title="throughput (tokens/s per GPU)", ticks=ticks(values, x)),
        y=Axis(title="recipe", ticks=()),
        y_grid=False,
        x_grid=True,
        marks=tuple(marks),
        strokes=tuple(_strokes(lines, heights_px, x)),
        notes=tuple(
            Note(text=line.name, x_px=LEFT_PX + 4, y_px=y_px - 11, role="row-name")
            for line, y_px in zip(lines, heights_px, strict=True)
        ),
        legend=legend_of(marks, ROLES),
        data=Data(
            headings=("recipe", "kind", "row or runs", "tokens/s/GPU", "95 % interval"),
            rows=tuple(_cells(line.name, number) for line in lines for number in line.numbers),
        ),
    )


def _mark(number: Throughput, x: Place, y_px: float) -> Mark:
    kind = "published" if number.role == "context" else number.role
    return Mark(
        shape=_SHAPES[number.role],
        role=number.role,
        x_px=x(number.tokens_per_s_per_gpu),
        y_px=y_px,
        tip=f"{number.label}: {number.tokens_per_s_per_gpu:,.0f} tokens/s/GPU ({kind})",
    )


def _strokes(lines: Sequence[Line], heights_px: Sequence[float], x: Place) -> Iterable[Stroke]:
    for line, y_px in zip(lines, heights_px, strict=True):
        yield Stroke(role="row-line", points_px=((LEFT_PX, y_px), (RIGHT_PX, y_px)))
        for number in line.numbers:
            if number.low_tokens_per_s is not None and number.high_tokens_per_s is not None:
                ends = ((x(number.low_tokens_per_s), y_px), (x(number.high_tokens_per_s), y_px))
                yield Stroke(role=f"interval {number.role}", points_px=ends)


def _cells(name: str, number: Throughput) -> tuple[str, ...]:
    low, high = number.low_tokens_per_s, number.high_tokens_per_s
    interval = "-" if low is None or high is None else f"{low:,.0f} to {high:,.0f}"
    kind = "published, another row" if number.role == "context" else number.role
    return (name, kind, number.label, f"{number.tokens_per_s_per_gpu:,.0f}", interval)
