"""What `project` prints: step time and interval, waterfall, memory, limits, and published rows beside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.analysis.memory import needed_bytes
from moe_bench.analysis.memory_verdict import rank_verdict, verdict
from moe_bench.projection.forecast import Forecast
from moe_bench.projection.interval import Bounds
from moe_bench.projection.nearest import NearRow
from moe_bench.projection.step import Projection
from moe_bench.report.columns import Columns
from moe_bench.report.figures import GIB, rate_text, seconds_text, tflops_text, tokens_text
from moe_bench.report.recipe_list import layout_label

if TYPE_CHECKING:
    from moe_bench.projection.cost import TrainingCost
    from moe_bench.projection.scaleout import ScaleOut

NOT_MEASURED = "projected: nothing here was measured"
_MWH_J = 3.6e9
_S_PER_DAY = 86_400
_BAR_COLUMNS = 24


def forecast_view(made: Forecast, near: Sequence[NearRow], *, modified: Sequence[str]) -> RenderableType:
    """One recipe, from the step time to what it rests on."""
    recipe = made.recipe
    return Group(
        Text(f"{recipe.name} on {recipe.system.display_name}", style="bold"),
        Text(layout_label(recipe), style="dim"),
        Text(NOT_MEASURED, style="yellow"),
        *([Text(f"modified: {', '.join(modified)}", style="yellow")] if modified else ()),
        Text(),
        _headline(made),
        Text(),
        _waterfall(made.projection),
        Text(_passes_text(made.projection), style="dim"),
        Text(),
        _memory(made),
        Text(),
        near_view(near),
        Text(),
        Text("assumed: " + "; ".join(made.assumptions), style="dim"),
    )


def limits_text(made: Forecast) -> str:
    """What limits the step, in one sentence."""
    step_s = made.projection.step_s
    named = [f"{term.name} ({term.seconds / step_s:.0%})" for term in made.limits]
    return f"{', '.join(named[:-1])} and {named[-1]} take most of the step" if len(named) > 1 else named[0]


def near_view(near: Sequence[NearRow]) -> RenderableType:
    """Published rows beside their own projections."""
    if not near:
        return Text("published rows: none of this model, and none of another on this system and precision")
    table = Columns(
        headings=(
            "nearest published row",
            "GPU",
            "GPUs",
            "layout",
            "published",
            "projected",
            "ratio",
            "nine in ten",
            "trust",
        ),
        rows=tuple(
            (
                one.run.row.id,
                one.run.row.hardware or "-",
                str(one.run.recipe.parallel.num_gpus),
                layout_label(one.run.recipe),
                rate_text(one.run.tokens_per_s_per_gpu),
                rate_text(one.projected_tokens_per_s_per_gpu),
                f"{one.ratio:.3f}",
                "-".join(f"{ratio:.2f}" for ratio in one.p90_ratios),
                one.run.row.trust,
            )
            for one in near
        ),
        right=frozenset(("GPUs", "published", "projected", "ratio", "nine in ten")),
        is_stacked=True,
    )
    return Group(
        table,
        Text(
            "tokens/s/GPU of the row's own configuration; ratio is projected over published, and where it is "
            "for nine in ten rows that print as much",
            style="dim",
        ),
    )


def scale_view(curve: ScaleOut) -> RenderableType:
    """Weak or strong scaling as a table."""
    mode = "strong scaling, GBS kept" if curve.is_strong else "weak scaling, sequences per replica kept"
    table = Columns(
        headings=(
            "GPUs", "GBS", "median step", "one in ten over", "tokens/s/GPU", "efficiency",
            "EP over", "DP over", "PP over",
        ),
        rows=tuple(
            (
                f"{point.num_gpus:,}",
                f"{point.projection.recipe.global_batch_size:,}",
                seconds_text(point.projection.step_s),
                seconds_text(point.p90_step_s),
                rate_text(point.projection.tokens_per_s_per_gpu),
                f"{point.efficiency_ratio:.1%}",
                point.expert_level,
                point.data_level,
                point.pipeline_level,
            )
            for point in curve.points
        ),
        right=frozenset(("GPUs", "GBS", "median step", "one in ten over", "tokens/s/GPU", "efficiency")),
    )  # fmt: skip
    refused = [Text(f"{size.num_gpus:,} GPUs: {size.rule}", style="yellow") for size in curve.refused]
    note = (
        "steps of one run spread as its slowest rank does; how sure the projection is, is said above. "
        "Over: the highest level of the fabric that a group of ranks crosses"
    )
    return Group(Text(mode, style="bold"), table, *refused, Text(note, style="dim"))


def cost_view(
    costs: Sequence[TrainingCost], made: Forecast, *, price_per_gpu_hour: float | None
) -> RenderableType:
    """What a whole training takes at each size, as sure as the step of `made` is."""
    step_s, ends = made.projection.step_s, made.interval.p90
    ratios = ends.low_s / step_s, ends.high_s / step_s
    headings = ("GPUs", "days", "nine in ten", "GPU-hours", "MWh at most")
    priced = () if price_per_gpu_hour is None else (f"price at {price_per_gpu_hour:g} per GPU-hour",)
    table = Columns(
        headings=(*headings, *priced),
        rows=tuple(
            (
                f"{cost.num_gpus:,}",
                f"{cost.time_s / _S_PER_DAY:,.1f}",
                "-".join(f"{cost.time_s * ratio / _S_PER_DAY:,.1f}" for ratio in ratios),
                f"{cost.gpu_hours:,.0f}",
                f"{cost.max_energy_j / _MWH_J:,.0f}",
                *(
                    ()
                    if price_per_gpu_hour is None
                    else (f"{cost.price(per_gpu_hour=price_per_gpu_hour):,.0f}",)
                ),
            )
            for cost in costs
        ),
        right=frozenset((*headings, *priced)),
    )
    return Group(
        Text(f"training on {tokens_text(costs[0].num_tokens)}", style="bold"),
        table,
        Text(
            "energy: every GPU at its maximum power; not counted are hosts, restarts and evaluation",
            style="dim",
        ),
    )


def what_if_view(base: Forecast, other: Forecast, changes: Sequence[str]) -> RenderableType:
    """Both columns with their difference, terms included."""
    rows = [
        (name, shown(one), shown(two), _change(one, two)) for name, one, two, shown in _pairs(base, other)
    ]
    own, theirs = (one.memory.worst.total_bytes for one in (base, other))
    rows.append(("fullest rank", f"{own / GIB:.1f} GiB", f"{theirs / GIB:.1f} GiB", _change(own, theirs)))
    rows.append(("memory", verdict(base.memory), verdict(other.memory), ""))
    besides = [text for text in other.assumptions if text not in base.assumptions]
    return Group(
        Text(f"what if {', '.join(changes)}", style="bold"),
        Columns(
            headings=("", "as asked", "what if", "change"),
            rows=tuple(rows),
            right=frozenset(("as asked", "what if", "change")),
        ),
        *([Text(f"assumed besides: {'; '.join(besides)}")] if besides else []),
    )


def _pairs(base: Forecast, other: Forecast) -> Iterable[tuple[str, float, float, Callable[[float], str]]]:
    """Name, both values, and how they are printed."""
    one, two = base.projection, other.projection
    yield "step time", one.step_s, two.step_s, seconds_text
    yield "tokens/s/GPU", one.tokens_per_s_per_gpu, two.tokens_per_s_per_gpu, rate_text
    yield "TFLOPs/GPU", one.flops_per_s_per_gpu, two.flops_per_s_per_gpu, tflops_text
    first, second = ({term.name: term.seconds for term in each.terms} for each in (one, two))
    for name in dict.fromkeys((*first, *second)):
        yield name, first.get(name, 0.0), second.get(name, 0.0), seconds_text


def _headline(made: Forecast) -> RenderableType:
    projection, interval = made.projection, made.interval
    lines = [
        ("step time", f"{seconds_text(projection.step_s)}  (half of runs {_bounds_text(interval.p50)}, "
         f"nine in ten {_bounds_text(interval.p90)}: {interval.basis})"),
        ("tokens/s/GPU", rate_text(projection.tokens_per_s_per_gpu)),
        ("TFLOPs/GPU", tflops_text(projection.flops_per_s_per_gpu)),
        ("MFU", f"{projection.mfu_fraction:.1%} of the dense BF16 peak"),
        ("limited by", limits_text(made)),
        ("bubble", _bubble_text(projection)),
        ("load", f"{made.load.name}: the busiest rank receives {made.load.busiest_over_mean_ratio:.3f} "
         "times the mean"),
        ("memory", _memory_text(made)),
    ]  # fmt: skip
    width = max(len(label) for label, _ in lines)
    return Group(*(Text(f"{label.ljust(width)}  {value}") for label, value in lines))


def _bounds_text(bounds: Bounds) -> str:
    return f"{seconds_text(bounds.low_s)} to {seconds_text(bounds.high_s)}"


def _bubble_text(projection: Projection) -> str:
    if projection.timeline is None:
        return "none, there is no pipeline"
    kind = projection.timeline.shape.kind.label
    return f"{projection.timeline.bubble_fraction:.1%} of all ranks' time ({kind}, simulated)"


def _memory_text(made: Forecast) -> str:
    worst, usable_bytes = made.memory.worst, made.memory.usable_bytes
    return (
        f"{verdict(made.memory)}: {worst.total_bytes / GIB:.1f} GiB, at most "
        f"{needed_bytes(worst) / GIB:.1f}, of {usable_bytes / GIB:.1f} usable on the fullest rank"
    )


def _change(one: float, two: float) -> str:
    return f"{two / one - 1:+.1%}" if one else "new"


def _waterfall(projection: Projection) -> Columns:
    largest_s = max(term.seconds for term in projection.terms)
    rows = [
        (
            term.name,
            seconds_text(term.seconds),
            f"{term.seconds / projection.step_s:.1%}",
            term.grade.label,
            "█" * round(_BAR_COLUMNS * term.seconds / largest_s),
        )
        for term in projection.terms
    ]
    rows.append(("step", seconds_text(projection.step_s), "100.0%", "", ""))
    return Columns(
        headings=("where the step goes", "time", "share", "evidence", " "),
        rows=tuple(rows),
        right=frozenset(("time", "share")),
    )


def _passes_text(projection: Projection) -> str:
    passes = ", ".join(
        f"{name} {seconds_text(seconds)}" for name, seconds in projection.passes_s.items() if seconds
    )
    return f"kernels by pass on pipeline rank {projection.critical_rank}, the busiest: {passes}"


def _memory(made: Forecast) -> RenderableType:
    fit = made.memory
    rows = [
        (
            str(rank.pipeline_rank),
            f"{rank.total_bytes / GIB:.1f}",
            f"{needed_bytes(rank) / GIB:.1f}",
            f"{fit.usable_bytes / GIB:.1f}",
            rank_verdict(rank, fit.usable_bytes),
        )
        for rank in fit.ranks
    ]
    return Columns(
        headings=("pipeline rank", "memory (GiB)", "upper bound", "usable", "verdict"),
        rows=tuple(rows),
        right=frozenset(("pipeline rank", "memory (GiB)", "upper bound", "usable")),
    )
