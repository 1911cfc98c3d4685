"""Charts about one training run: its losses, and how evenly its experts were used, step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import batched
from statistics import fmean

from moe_bench.report.figures import steps_text
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
class MeanLoss:
    """Mean of the losses from one step to another, in nats per token."""

    first_step: int
    last_step: int
    num_losses: int
    loss: float

    @property
    def steps(self) -> str:
        """From the first to the last."""
        return steps_text(self.first_step, self.last_step)


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
        return steps_text(self.first_step, self.last_step)


def loss_chart(key: str, lines: Sequence[LogLine]) -> Chart:
    """Training and validation loss; marks are means where losses are more than MAX_POINTS. Needs a line."""
    training = _means([(line.step, line.loss) for line in lines])
    validation = _means(
        [(line.step, line.validation_loss) for line in lines if line.validation_loss is not None]
    )
    losses = [one.loss for one in (*training, *validation)]
    values = round_range(min(losses), max(losses))
    x, y = _step_place(lines[-1].step), _place(values)
    marks = (*_loss_marks("training", training, x, y), *_loss_marks("validation", validation, x, y))
    points = tuple((x(one.last_step), y(one.loss)) for one in training)
    return Chart(
        key=key,
        title="Loss",
        caption="Cross entropy in nats per token of the global batch, and of held-out text."
        f"{_mean_text('training steps', training)}{_mean_text('validations', validation)}{_from(values)}",
        height_px=HEIGHT_PX,
        x=Axis(title="step", ticks=whole_axis(1, lines[-1].step, x)),
        y=Axis(title="loss (nats per token)", ticks=ticks(values, y)),
        marks=marks,
        strokes=(Stroke(role="join measured", points_px=points),),
        legend=legend_of(marks, _LOSSES),
        data=Data(
            headings=("steps", "training loss", "validation loss"), rows=_loss_rows(training, validation)
        ),
    )


def _means(losses: Sequence[tuple[int, float]]) -> tuple[MeanLoss, ...]:
    """Of (step, loss), MAX_POINTS at most, each of equally many, but for the last."""
    return tuple(
        MeanLoss(
            first_step=group[0][0],
            last_step=group[-1][0],
            num_losses=len(group),
            loss=fmean(loss for _, loss in group),
        )
        for group in batched(losses, _stride(len(losses)))
    )


def _loss_marks(role: str, means: Sequence[MeanLoss], x: Place, y: Place) -> Iterable[Mark]:
    for one in means:
        yield Mark(
            shape="dot" if role == "training" else "square",
            role=role,
            x_px=x(one.last_step),
            y_px=y(one.loss),
            tip=f"{one.steps}: {one.loss:.4f}, {role}",
        )


def _mean_text(what: str, means: Sequence[MeanLoss]) -> str:
    most = max((one.num_losses for one in means), default=1)
    return "" if most == 1 else f" A mark is the mean of {most} {what}, at the last of them."


def _loss_rows(training: Sequence[MeanLoss], validation: Sequence[MeanLoss]) -> tuple[tuple[str, ...], ...]:
    """In the order of the steps; a validation stands beside the training step that it followed, if drawn."""
    held_out = {one.steps: one for one in validation}
    rows = [
        (one.last_step, one.steps, f"{one.loss:.4f}", f"{beside.loss:.4f}" if beside else "-")
        for one in training
        for beside in [held_out.pop(one.steps, None)]
    ]
    rows += [(one.last_step, one.steps, "-", f"{one.loss:.4f}") for one in held_out.values()]
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
        over=steps_text(line.step - line.num_steps + 1, line.step),
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


def _alarms_text(num_alarms: int) -> str:
    return {0: "", 1: ", an alarm"}.get(num_alarms, f", {num_alarms} alarms")
