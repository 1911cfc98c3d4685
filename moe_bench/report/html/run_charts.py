"""Charts about one run: step times, memory of every rank, and how tokens were spread over experts."""

from __future__ import annotations

from moe_bench.report.figures import GIB
from moe_bench.report.html.axis import Axis, linear, round_range, ticks, whole_axis
from moe_bench.report.html.chart import (
    BOTTOM_PX,
    LEFT_PX,
    RIGHT_PX,
    TOP_PX,
    Band,
    Chart,
    Data,
    Mark,
    Note,
    Stroke,
    legend_of,
)
from moe_bench.report.html.load_grid import load_grid, load_ratios
from moe_bench.results.metrics import RunMetrics, run_metrics, step_load_ratio
from moe_bench.results.record import Record

HEIGHT_PX = 220
STEPS = {
    "steady": "timed step",
    "unsteady": "before the steady steps, not counted",
    "outlier": "outlier, counted",
}


def step_time_chart(key: str, record: Record) -> Chart:
    """Every timed step: the slowest rank as a mark, the other ranks as a line below it."""
    metrics = run_metrics(record)
    slowest_s = record.slowest_step_times_s()
    fastest_s = [min(times) for times in zip(*record.samples.step_times_s, strict=True)]
    scale, unit = (1.0, "s") if metrics.step_time_s >= 1 else (1e3, "ms")
    values = round_range(min(fastest_s) * scale, max(slowest_s) * scale)
    x = linear(0.5, len(slowest_s) + 0.5, start_px=LEFT_PX, end_px=RIGHT_PX)
    y = linear(values[0] / scale, values[-1] / scale, start_px=HEIGHT_PX - BOTTOM_PX, end_px=TOP_PX)
    roles = step_roles(metrics, len(slowest_s))
    steps = tuple(enumerate(zip(slowest_s, fastest_s, roles, strict=True), start=1))
    marks = tuple(
        Mark(shape="dot", role=role, x_px=x(step), y_px=y(slow_s), tip=f"step {step}: {slow_s:.4g} s")
        for step, (slow_s, _, role) in steps
    )
    spreads = tuple(
        Stroke(role="spread", points_px=((x(step), y(fast_s)), (x(step), y(slow_s))))
        for step, (slow_s, fast_s, _) in steps
        if record.num_ranks > 1
    )
    low_px, median_px, high_px = map(
        y, (metrics.step_time_low_s, metrics.step_time_s, metrics.step_time_high_s)
    )
    return Chart(
        key=key,
        title="Step time",
        caption=f"Median {metrics.step_time_s * scale:.4g} {unit}, its 95 % interval as a band. A mark is "
        "the slowest rank of a step, the line below reaches to the fastest. The axis does not start at 0.",
        height_px=HEIGHT_PX,
        x=Axis(title="timed step", ticks=whole_axis(1, len(slowest_s), x)),
        y=Axis(title=f"step time ({unit})", ticks=ticks(values, lambda value: y(value / scale))),
        marks=marks,
        bands=(
            Band(
                role="median-band",
                x_px=LEFT_PX,
                y_px=high_px,
                width_px=RIGHT_PX - LEFT_PX,
                height_px=max(low_px - high_px, 0.5),
            ),
        ),
        strokes=(*spreads, Stroke(role="median", points_px=((LEFT_PX, median_px), (RIGHT_PX, median_px)))),
        legend=legend_of(marks, STEPS),
        data=Data(
            headings=("step", "slowest rank (s)", "fastest rank (s)", "kind"),
            rows=tuple(
                (str(step), f"{slow_s:.6g}", f"{fast_s:.6g}", STEPS[role])
                for step, (slow_s, fast_s, role) in steps
            ),
        ),
    )


def step_roles(metrics: RunMetrics, num_steps: int) -> list[str]:
    """A key of STEPS for every timed step."""
    return [
        "unsteady"
        if step < metrics.first_steady_step
        else "outlier"
        if step in metrics.outlier_steps
        else "steady"
        for step in range(num_steps)
    ]


def peak_memory_chart(key: str, record: Record) -> Chart:
    """Peak memory of every rank, from zero, beside what its GPU can hold."""
    peaks_gib = [peak / GIB for peak in record.samples.peak_memory_bytes]
    gpu = record.plan.recipe.system.gpu
    usable_gib = None if gpu is None else gpu.usable_bytes / GIB
    values = round_range(0, max(*peaks_gib, usable_gib or 0, 0))
    bottom = HEIGHT_PX - BOTTOM_PX
    x = linear(-0.5, len(peaks_gib) - 0.5, start_px=LEFT_PX, end_px=RIGHT_PX)
    y = linear(0, values[-1], start_px=bottom, end_px=TOP_PX)
    marks = tuple(
        Mark(shape="dot", role="measured", x_px=x(rank), y_px=y(peak), tip=f"rank {rank}: {peak:.2f} GiB")
        for rank, peak in enumerate(peaks_gib)
    )
    strokes: tuple[Stroke, ...] = ()
    notes: tuple[Note, ...] = ()
    if usable_gib is not None:
        strokes = (Stroke(role="limit", points_px=((LEFT_PX, y(usable_gib)), (RIGHT_PX, y(usable_gib)))),)
        notes = (
            Note(text=f"{usable_gib:.1f} GiB usable", x_px=RIGHT_PX, y_px=y(usable_gib) + 13, anchor="end"),
        )
    what = "Device memory allocated" if gpu is not None else "Resident memory of the process, without a GPU"
    return Chart(
        key=key,
        title="Peak memory, measured",
        caption=f"{what}; the fullest rank holds {max(peaks_gib):.2f} GiB.",
        height_px=HEIGHT_PX,
        x=Axis(title="rank", ticks=whole_axis(0, len(peaks_gib) - 1, x)),
        y=Axis(title="peak memory (GiB)", ticks=ticks(values, y)),
        marks=marks,
        strokes=strokes,
        notes=notes,
        data=Data(
            headings=("rank", "peak (GiB)"),
            rows=tuple((str(rank), f"{peak:.3f}") for rank, peak in enumerate(peaks_gib)),
        ),
    )


def worst_load_ratios(record: Record) -> tuple[float, ...]:
    """Per step the busiest expert's tokens over its layer's mean, in the layer where that is largest."""
    ratios = map(step_load_ratio, record.samples.tokens_per_expert)
    return tuple(ratio for ratio in ratios if ratio is not None)


def load_chart(key: str, record: Record) -> Chart:
    """Max over mean of the tokens per expert, by step. Raises ValueError where no tokens were counted."""
    ratios = worst_load_ratios(record)
    values = round_range(1, max(*ratios, 1.1))
    bottom = HEIGHT_PX - BOTTOM_PX
    x = linear(0.5, len(ratios) + 0.5, start_px=LEFT_PX, end_px=RIGHT_PX)
    y = linear(values[0], values[-1], start_px=bottom, end_px=TOP_PX)
    points = tuple((x(step + 1), y(ratio)) for step, ratio in enumerate(ratios))
    return Chart(
        key=key,
        title="Expert load: max over mean",
        caption="Tokens of the busiest expert over the mean of its layer, in the worst layer of each step; 1 "
        f"is perfect balance. Routing: {record.plan.recipe.routing.mode.replace('_', ' ')}.",
        height_px=HEIGHT_PX,
        x=Axis(title="timed step", ticks=whole_axis(1, len(ratios), x)),
        y=Axis(title="max over mean (×)", ticks=ticks(values, y)),
        marks=tuple(
            Mark(shape="dot", role="measured", x_px=px, y_px=py, tip=f"step {step + 1}: {ratio:.3f} ×")
            for step, ((px, py), ratio) in enumerate(zip(points, ratios, strict=True))
        ),
        strokes=(Stroke(role="join measured", points_px=points),),
        data=Data(
            headings=("step", "max over mean"),
            rows=tuple((str(step + 1), f"{ratio:.4f}") for step, ratio in enumerate(ratios)),
        ),
    )


def layer_loads(record: Record) -> tuple[tuple[float, ...], ...]:
    """Per expert layer, each expert's tokens over all timed steps, over the layer's mean."""
    steps = record.samples.tokens_per_expert
    if not steps:
        return ()
    return tuple(
        load_ratios([sum(step[layer][expert] for step in steps) for expert in range(len(steps[0][layer]))])
        for layer in range(len(steps[0]))
    )


def load_heatmap(key: str, record: Record) -> Chart:
    """Experts by layers, coloured by load. Raises ValueError where no tokens were counted."""
    loads = layer_loads(record)
    return load_grid(
        key, loads, names=[str(index) for index in range(len(loads))], over="all timed steps added"
    )
