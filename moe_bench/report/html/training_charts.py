"""Charts about one training run: its losses, and how evenly its experts were used, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import batched
from statistics import fmean

from moe_bench.report.html.axis import Axis, Place, linear, round_range, ticks, whole_axis
from moe_bench.report.html.chart import (
    BOTTOM_PX,
    LEFT_PX,
    RIGHT_PX,
    TOP_PX,
    Chart,
    Data,
    Mark,
    Stroke,
    legend_of,
)
from moe_bench.report.html.load_grid import load_grid, load_ratios
from moe_bench.results.training_health import HealthLine
from moe_bench.results.training_log import LogLine

HEIGHT_PX = 220
MAX_POINTS = 200
"""Marks of one curve; a longer run has several steps in each."""
_LOSSES = {"training": "training", "validation": "validation"}
_WINDOWS = {"steady": "least even layer", "outlier": "the same, with an alarm"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Evenness:
    """Least and most even layer of some steps, by the entropy of the load over that of an even one."""

    first_step: int
    last_step: int
    low_fraction: float
    low_layer: str
    high_fraction: float
    num_alarms: int

    @property
    def steps(self) -> str:
        """From the first to the last."""
        return _steps_text(self.first_step, self.last_step)


def loss_chart(key: str, lines: Sequence[LogLine]) -> Chart:
    """Training loss, the mean of equally many steps at each mark, and validation loss. `lines` has one."""
    stride = _stride(len(lines))
    means = [
        (group[0].step, group[-1].step, fmean(line.loss for line in group))
        for group in batched(lines, stride)
    ]
    held_out = [(line.step, line.validation_loss) for line in lines if line.validation_loss is not None]
    losses = [loss for *_, loss in means] + [loss for _, loss in held_out]
    values = round_range(min(losses), max(losses))
    x, y = _step_place(lines[-1].step), _place(values)
    points = tuple((x(last), y(loss)) for _, last, loss in means)
    marks = (
        *(
            Mark(
                shape="dot", role="training", x_px=px, y_px=py, tip=f"{_steps_text(first, last)}: {loss:.4f}"
            )
            for (px, py), (first, last, loss) in zip(points, means, strict=True)
        ),
        *(
            Mark(
                shape="square",
                role="validation",
                x_px=x(step),
                y_px=y(loss),
                tip=f"step {step}: {loss:.4f}, validation",
            )
            for step, loss in held_out
        ),
    )
    mean = "" if stride == 1 else f" A mark of training is the mean of {stride} steps, at the last of them."
    return Chart(
        key=key,
        title="Loss",
        caption=f"Cross entropy in nats per token of the global batch, and of held-out text.{mean}"
        f"{_from(values)}",
        height_px=HEIGHT_PX,
        x=Axis(title="step", ticks=whole_axis(1, lines[-1].step, x)),
        y=Axis(title="loss (nats per token)", ticks=ticks(values, y)),
        marks=marks,
        strokes=(Stroke(role="join measured", points_px=points),),
        legend=legend_of(marks, _LOSSES),
        data=Data(headings=("steps", "training loss", "validation loss"), rows=_loss_rows(means, held_out)),
    )


def _loss_rows(
    means: Sequence[tuple[int, int, float]], held_out: Sequence[tuple[int, float]]
) -> tuple[tuple[str, ...], ...]:
    """In the order of the steps; a validation stands beside the steps that end where it was taken."""
    by_step = dict(held_out)
    ends = {last for _, last, _ in means}
    rows = [
        (last, _steps_text(first, last), f"{loss:.4f}", f"{by_step[last]:.4f}" if last in by_step else "-")
        for first, last, loss in means
    ]
    rows += [(step, f"step {step}", "-", f"{loss:.4f}") for step, loss in held_out if step not in ends]
    return tuple(tuple(cells) for _, *cells in sorted(rows))


def evenness(lines: Sequence[HealthLine]) -> tuple[Evenness, ...]:
    """Of every window, or of several on end where there are more than MAX_POINTS; none without a token."""
    found = []
    for group in batched(lines, _stride(len(lines))):
        known = [
            (layer.entropy_fraction, layer.layer)
            for line in group
            for layer in line.layers
            if layer.entropy_fraction is not None
        ]
        if known:
            low_fraction, low_layer = min(known)
            found.append(
                Evenness(
                    first_step=group[0].step - group[0].num_steps + 1,
                    last_step=group[-1].step,
                    low_fraction=low_fraction,
                    low_layer=low_layer,
                    high_fraction=max(known)[0],
                    num_alarms=sum(len(line.alarms) for line in group),
                )
            )
    return tuple(found)


def entropy_chart(key: str, windows: Sequence[Evenness]) -> Chart:
    """The least even layer of each of `windows` as a mark, the others as a line above. There is one."""
    values = round_range(min(one.low_fraction for one in windows), 1)
    x, y = _step_place(windows[-1].last_step), _place(values)
    points = tuple((x(one.last_step), y(one.low_fraction)) for one in windows)
    marks = tuple(
        Mark(
            shape="dot",
            role="outlier" if one.num_alarms else "steady",
            x_px=px,
            y_px=py,
            tip=f"{one.steps}: {one.low_fraction:.4f} of {one.low_layer}{_alarms_text(one.num_alarms)}",
        )
        for (px, py), one in zip(points, windows, strict=True)
    )
    return Chart(
        key=key,
        title="Entropy of the expert load",
        caption="Over that of an even load: 1 is balance, 0 one expert for all. A mark is the least even "
        f"layer of a window of steps, the line above reaches to the most even one.{_from(values)}",
        height_px=HEIGHT_PX,
        x=Axis(title="step", ticks=whole_axis(1, windows[-1].last_step, x)),
        y=Axis(title="entropy (fraction)", ticks=ticks(values, y)),
        marks=marks,
        strokes=(
            *(
                Stroke(role="spread", points_px=((px, py), (px, y(one.high_fraction))))
                for (px, py), one in zip(points, windows, strict=True)
            ),
            Stroke(role="join measured", points_px=points),
        ),
        legend=legend_of(marks, _WINDOWS),
        data=Data(
            headings=("steps", "lowest entropy", "its layer", "highest entropy", "alarms"),
            rows=tuple(
                (
                    one.steps,
                    f"{one.low_fraction:.4f}",
                    one.low_layer,
                    f"{one.high_fraction:.4f}",
                    str(one.num_alarms),
                )
                for one in windows
            ),
        ),
    )


def training_load_grid(key: str, line: HealthLine) -> Chart:
    """Experts by layers over the steps of `line`. Raises ValueError where it has no layer."""
    return load_grid(
        key,
        [load_ratios(layer.tokens_per_expert) for layer in line.layers],
        names=[f"{index} ({layer.layer})" for index, layer in enumerate(line.layers)],
        over=_steps_text(line.step - line.num_steps + 1, line.step),
    )


def training_charts(index: int, log: Sequence[LogLine], health: Sequence[HealthLine]) -> Iterable[Chart]:
    """Those that there is something to draw of; `index` makes their keys unique."""
    if log:
        yield loss_chart(f"loss-{index}", log)
    windows = evenness(health)
    if windows:
        yield entropy_chart(f"entropy-{index}", windows)
    if health and health[-1].layers:
        yield training_load_grid(f"training-experts-{index}", health[-1])


def _stride(num_lines: int) -> int:
    return max(1, -(-num_lines // MAX_POINTS))


def _step_place(last_step: int) -> Place:
    return linear(0.5, last_step + 0.5, start_px=LEFT_PX, end_px=RIGHT_PX)


def _place(values: Sequence[float]) -> Place:
    return linear(values[0], values[-1], start_px=HEIGHT_PX - BOTTOM_PX, end_px=TOP_PX)


def _from(values: Sequence[float]) -> str:
    return "" if values[0] == 0 else " The vertical axis does not start at 0."


def _steps_text(first: int, last: int) -> str:
    return f"step {last}" if first == last else f"steps {first} to {last}"


def _alarms_text(num_alarms: int) -> str:
    return {0: "", 1: ", an alarm"}.get(num_alarms, f", {num_alarms} alarms")
