"""Where the time of a projected step goes: a bar per term, each beginning where the one above it ends."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.projection.forecast import Forecast
from moe_bench.projection.step import Projection
from moe_bench.projection.work.operations import Part
from moe_bench.report.figures import seconds_text
from moe_bench.report.html.axis import Axis, Place, Tick, linear, round_range, ticks
from moe_bench.report.html.chart import BOTTOM_PX, RIGHT_PX, TOP_PX, Chart, Data, Mark, Stroke, legend_of

LEFT_PX = 208
"""Room for the title of the axis and the longest name of a term."""
ROW_PX = 17.0
BAR_FRACTION = 0.72
MIN_BAR_PX = 0.8
"""Of a term that is there: a millisecond of seconds would round to nothing."""
ROLES = {
    "kernels": "kernels of layers",
    "traffic": "traffic and host in the open",
    "pipeline": "pipeline",
    "states": "gradients, parameters, optimizer",
    "waiting": "waiting for slow ranks",
}
_ROLE_OF = {
    **{part.value: "kernels" for part in Part},
    "pipeline bubble": "pipeline",
    "pipeline transfers": "pipeline",
    "weight gathers": "states",
    "gradient reduction": "states",
    "parameter gathering": "states",
    "optimizer": "states",
    "stragglers": "waiting",
}
_OTHER = "traffic"


def waterfall_chart(key: str, made: Forecast) -> Chart:
    """The terms of `made` in their order; together they are its step."""
    projection = made.projection
    height_px = round(TOP_PX + ROW_PX * len(projection.terms) + BOTTOM_PX)
    unit, per_s = ("ms", 1e3) if projection.step_s < 1 else ("s", 1.0)
    whole = projection.step_s * per_s
    values = [value for value in round_range(0, whole) if value <= whole]
    x = linear(0, projection.step_s, start_px=LEFT_PX, end_px=RIGHT_PX)
    marks = tuple(_bars(projection, x))
    end_px = x(projection.step_s)
    interval = made.interval.p90
    return Chart(
        key=key,
        title="Where the step goes, projected",
        caption=f"Projected, not measured: {seconds_text(projection.step_s)}, nine runs in ten "
        f"{seconds_text(interval.low_s)} to {seconds_text(interval.high_s)} ({made.interval.basis}). "
        f"Pipeline rank {projection.critical_rank}, the busiest; the dashed line is the whole step.",
        height_px=height_px,
        left_px=LEFT_PX,
        x=Axis(title=f"time ({unit})", ticks=ticks(values, lambda value: x(value / per_s))),
        y=Axis(
            title="term",
            ticks=tuple(
                Tick(position_px=TOP_PX + ROW_PX * (row + 0.5), label=term.name)
                for row, term in enumerate(projection.terms)
            ),
        ),
        y_grid=False,
        x_grid=True,
        marks=marks,
        strokes=(Stroke(role="limit", points_px=((end_px, TOP_PX), (end_px, height_px - BOTTOM_PX))),),
        legend=legend_of(marks, ROLES),
        data=Data(
            headings=("term", "time", "share", "evidence"),
            rows=tuple(
                (
                    term.name,
                    seconds_text(term.seconds),
                    f"{term.seconds / projection.step_s:.1%}",
                    term.grade.label,
                )
                for term in projection.terms
            ),
        ),
    )


def _bars(projection: Projection, x: Place) -> Iterator[Mark]:
    before_s = 0.0
    for row, term in enumerate(projection.terms):
        start_px, end_px = x(before_s), x(before_s + term.seconds)
        yield Mark(
            shape="bar",
            role=_ROLE_OF.get(term.name, _OTHER),
            x_px=start_px,
            y_px=TOP_PX + ROW_PX * (row + (1 - BAR_FRACTION) / 2),
            width_px=max(MIN_BAR_PX, end_px - start_px),
            height_px=ROW_PX * BAR_FRACTION,
            tip=f"{term.name}: {seconds_text(term.seconds)}, {term.seconds / projection.step_s:.1%}",
        )
        before_s += term.seconds
