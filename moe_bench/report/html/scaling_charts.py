"""One chart of weak or strong scaling per subject, its curves told apart by letters and by kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby

from moe_bench.report.html.axis import Axis, Place, Tick, linear, logarithmic, number, round_range, ticks
from moe_bench.report.html.chart import (
    BOTTOM_PX,
    LEFT_PX,
    RIGHT_PX,
    TOP_PX,
    Chart,
    Data,
    LegendEntry,
    Mark,
    Note,
    Shape,
    Stroke,
)
from moe_bench.report.scaling import Curve, Efficiency, Kind, MissingPoint, Mode
from moe_bench.report.scaling_table import curve_letter, interval_text, lost_repeat_text, missing_text

HEIGHT_PX = 240
_SHAPES: dict[Kind, Shape] = {Kind.MEASURED: "dot", Kind.PUBLISHED: "square", Kind.PROJECTED: "diamond"}
_EQUAL = {Mode.WEAK: "sequences per GPU", Mode.STRONG: "sequences per step"}
_DIGIT_PX, _LABEL_GAP_PX = 7.3, 4.0
_LETTER_PX = 12
"""Letters of neighbouring curves stand at least so far apart."""


def scaling_charts(curves: Sequence[Curve], names: Mapping[str, str]) -> tuple[Chart, ...]:
    """A chart for every subject and mode among `curves`, which are sorted so; `names` are those of models."""
    return tuple(
        _scaling_chart(f"scaling-{index}", list(members), names)
        for index, (_, members) in enumerate(groupby(curves, key=lambda curve: (curve.subject, curve.mode)))
    )


def _scaling_chart(key: str, curves: Sequence[Curve], names: Mapping[str, str]) -> Chart:
    subject, mode = curves[0].subject, curves[0].mode
    every = [one for curve in curves for one in curve.efficiencies]
    sizes = sorted({size for curve in curves for size in curve.sizes})
    values = round_range(
        min(0.9, *(one.low_ratio or one.efficiency_ratio for one in every)) * 100,
        max(1.02, *(one.high_ratio or one.efficiency_ratio for one in every)) * 100,
    )
    from_zero = "" if values[0] == 0 else " The vertical axis does not start at 0."
    bottom, right = HEIGHT_PX - BOTTOM_PX, RIGHT_PX - 16
    x = logarithmic(sizes[0], sizes[-1], start_px=LEFT_PX + 10, end_px=right - 6)
    y = linear(values[0], values[-1], start_px=bottom, end_px=TOP_PX)
    letters = [curve_letter(index) for index in range(len(curves))]
    lost = [
        f" {letters[index]}: {lost_repeat_text(point)}."
        for index, curve in enumerate(curves)
        for point in curve.lost_repeats
    ]
    model = names.get(subject.model, subject.model)
    return Chart(
        key=key,
        title=f"{str(mode).capitalize()} scaling: {model} on {subject.system}",
        caption=f"{subject.precision}, {subject.seq_len:,} tokens per sequence, equal {_EQUAL[mode]}."
        f"{from_zero}{''.join(lost)}",
        height_px=HEIGHT_PX,
        x=Axis(title="GPUs (logarithmic)", ticks=_size_ticks(sizes, x)),
        y=Axis(title="efficiency (%)", ticks=ticks(values, y)),
        marks=(
            *(mark for curve in sorted(curves, key=_depth) for mark in _marks(curve, x, y)),
            *(_missing_mark(point, x, y(values[0])) for curve in curves for point in curve.missing),
        ),
        strokes=(
            Stroke(role="ideal", points_px=((LEFT_PX, y(100)), (RIGHT_PX, y(100)))),
            *(stroke for curve in curves for stroke in _strokes(curve, x, y)),
        ),
        notes=tuple(_letters(curves, letters, x, y)),
        legend=tuple(entry for index, curve in enumerate(curves) for entry in _legend(letters[index], curve)),
        data=Data(
            headings=(
                "curve",
                "kind",
                "GPUs",
                "GBS",
                "tokens/s/GPU",
                "efficiency",
                "95 % interval",
                "recipe or row",
            ),
            rows=tuple(row for index, curve in enumerate(curves) for row in _rows(letters[index], curve)),
        ),
    )


def _legend(letter: str, curve: Curve) -> Iterable[LegendEntry]:
    yield LegendEntry(
        role=str(curve.kind), shape=_SHAPES[curve.kind], text=f"{letter}  {curve.kind}: {curve.name}"
    )
    for point in curve.missing:
        yield LegendEntry(role="missing", shape="cross", text=f"{letter}  {_missing_text(point)}")


def _missing_mark(point: MissingPoint, x: Place, y_px: float) -> Mark:
    """A cross on the axis: there is a size, and no efficiency."""
    return Mark(shape="cross", role="missing", x_px=x(point.num_gpus), y_px=y_px, tip=_missing_text(point))


def _missing_text(point: MissingPoint) -> str:
    return f"{point.num_gpus} GPUs, no number: {missing_text(point)}"


def _depth(curve: Curve) -> int:
    """Measured points are drawn last, on top of what they are held against."""
    return int(curve.kind is Kind.MEASURED)


def _marks(curve: Curve, x: Place, y: Place) -> Iterable[Mark]:
    for one in curve.efficiencies:
        yield Mark(
            shape=_SHAPES[curve.kind],
            role=str(curve.kind),
            x_px=x(one.point.num_gpus),
            y_px=y(one.efficiency_ratio * 100),
            tip=f"{one.point.num_gpus} GPUs: {one.efficiency_ratio:.1%}, {one.point.label} ({curve.kind})",
        )


def _strokes(curve: Curve, x: Place, y: Place) -> Iterable[Stroke]:
    """The line through the fastest point of each size, and the intervals."""
    fastest = [next(ones) for _, ones in groupby(curve.efficiencies, key=lambda one: one.point.num_gpus)]
    line = tuple((x(one.point.num_gpus), y(one.efficiency_ratio * 100)) for one in fastest)
    yield Stroke(role=f"join {curve.kind}", points_px=line)
    for one in curve.efficiencies:
        if one.low_ratio is not None and one.high_ratio is not None:
            at_px = x(one.point.num_gpus)
            ends = ((at_px, y(one.low_ratio * 100)), (at_px, y(one.high_ratio * 100)))
            yield Stroke(role=f"interval {curve.kind}", points_px=ends)


def _letters(curves: Sequence[Curve], letters: Sequence[str], x: Place, y: Place) -> Iterable[Note]:
    """A letter behind the last point of every curve, pushed down where two would lie on each other."""
    ends = sorted(
        (y(curve.efficiencies[-1].efficiency_ratio * 100), index) for index, curve in enumerate(curves)
    )
    lowest_px = float("-inf")
    for end_px, index in ends:
        lowest_px = max(end_px, lowest_px + _LETTER_PX)
        last_px = x(curves[index].efficiencies[-1].point.num_gpus)
        yield Note(text=letters[index], x_px=last_px + 10, y_px=lowest_px + 4, role="letter")


def _size_ticks(sizes: Sequence[int], place: Place) -> tuple[Tick, ...]:
    """A tick for every size; from the last one back, those with room for it have a label."""
    found, free_px = [], float("inf")
    for size in reversed(sizes):
        at_px, half_px = place(size), _DIGIT_PX * len(number(size)) / 2
        has_room = at_px + half_px < free_px
        found.append(Tick(position_px=at_px, label=number(size) if has_room else ""))
        free_px = at_px - half_px - _LABEL_GAP_PX if has_room else free_px
    return tuple(reversed(found))


def _rows(letter: str, curve: Curve) -> Iterable[tuple[str, ...]]:
    for one in curve.efficiencies:
        yield _row(letter, curve, one)
    for point in curve.missing:
        yield (
            letter,
            f"{curve.kind}, no number: {missing_text(point)}",
            str(point.num_gpus),
            str(point.global_batch_size),
            *("-", "-", "-"),
            point.label,
        )


def _row(letter: str, curve: Curve, one: Efficiency) -> tuple[str, ...]:
    point = one.point
    return (
        letter,
        str(curve.kind) + (f" ({point.remark})" if point.remark else ""),
        str(point.num_gpus),
        str(point.global_batch_size),
        f"{point.tokens_per_s_per_gpu:,.0f}",
        f"{one.efficiency_ratio:.1%}",
        interval_text(one),
        point.label,
    )
