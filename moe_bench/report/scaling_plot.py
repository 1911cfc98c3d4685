"""Scaling curves as a picture (PNG, SVG or PDF): one panel per subject and mode."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from moe_bench.errors import BadInputError
from moe_bench.report.scaling import Curve, Efficiency, Kind, MissingPoint
from moe_bench.report.scaling_table import curve_letter, missing_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_COLUMNS = 3
_LETTER_FRACTION = 0.06
"""Of the width of a panel, on a logarithmic axis."""
_NAME_WIDTH = 58
"""Characters after which the name of a curve is folded."""
_COLOURS = {Kind.MEASURED: "#1d5c99", Kind.PUBLISHED: "#a0460e", Kind.PROJECTED: "#4d6b1f"}
_MISSING_COLOUR = "#b01e3c"
_MARKERS = {Kind.MEASURED: "o", Kind.PUBLISHED: "s", Kind.PROJECTED: "D"}
_LINES = {Kind.MEASURED: "-", Kind.PUBLISHED: "--", Kind.PROJECTED: ":"}
"""Kinds differ in colour, marker and line, so that no reader depends on one of the three."""


def write_scaling_plot(curves: Sequence[Curve], path: Path) -> None:
    """Draw `curves`, sorted by subject and mode, into `path`; the suffix says how.

    Raises BadInputError where there is no curve.
    """
    if not curves:
        raise BadInputError(f"{path}: there is no scaling curve to draw; name other results, or drop --plot")
    # half a second of import that no other verb should pay for
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = [list(members) for _, members in groupby(curves, key=lambda curve: (curve.subject, curve.mode))]
    num_columns = min(MAX_COLUMNS, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(
        figsize=(4.8 * num_columns, 4.0 * num_rows), layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    )
    places = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for place in places:
        place.set_axis_off()
    for place, members in zip(places, panels, strict=False):
        _draw_panel(place, members)
    figure.savefig(path, dpi=160)


def _draw_panel(place: Axes, curves: Sequence[Curve]) -> None:
    place.set_axis_on()
    place.spines[["top", "right"]].set_visible(False)
    place.set_title(f"{curves[0].mode} scaling of {curves[0].subject}", fontsize=9, loc="left")
    place.grid(axis="y", color="#e4e1da", linewidth=0.6)
    place.axhline(100, color="#6d7177", linewidth=0.8)
    for index, curve in enumerate(curves):
        _draw_curve(place, curve, curve_letter(index))
    every = [one for curve in curves for one in curve.efficiencies]
    sizes = sorted({size for curve in curves for size in curve.sizes})
    place.set_xscale("log", base=2)
    place.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
    place.minorticks_off()
    # on the right there is room for the letters, however many sizes there are
    room = (sizes[-1] / sizes[0]) ** _LETTER_FRACTION
    place.set_xlim(sizes[0] / min(1.15, room), sizes[-1] * max(1.25, room))
    place.set_ylim(min(88.0, *(_low_pct(one) - 2 for one in every)), max(104.0, *map(_top_pct, every)))
    for index, curve in enumerate(curves):
        for point in curve.missing:
            _draw_missing(place, point, curve_letter(index))
    _write_letters(place, curves)
    place.set_xlabel("GPUs", fontsize=8)
    place.set_ylabel("efficiency (%)", fontsize=8)
    place.tick_params(axis="y", labelsize=8)
    place.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.05, -0.13))


def _draw_curve(place: Axes, curve: Curve, letter: str) -> None:
    """Every point as a marker, its interval as a whisker; the line joins the fastest point of each size."""
    colour, marker = _COLOURS[curve.kind], _MARKERS[curve.kind]
    face = colour if curve.kind is Kind.MEASURED else "white"
    fastest = [next(ones) for _, ones in groupby(curve.efficiencies, key=lambda one: one.point.num_gpus)]
    place.plot(
        [one.point.num_gpus for one in fastest],
        [one.efficiency_ratio * 100 for one in fastest],
        color=colour,
        marker=marker,
        markerfacecolor=face,
        linestyle=_LINES[curve.kind],
        linewidth=1.1,
        # on top of what it is held against
        zorder=3 if curve.kind is Kind.MEASURED else 2,
        label=textwrap.fill(f"{letter}  {curve.kind}: {curve.name}", _NAME_WIDTH),
    )
    for one in curve.efficiencies:
        at, percent = one.point.num_gpus, one.efficiency_ratio * 100
        if one.low_ratio is not None and one.high_ratio is not None:
            place.vlines(at, one.low_ratio * 100, one.high_ratio * 100, color=colour)
        if one not in fastest:
            place.plot([at], [percent], color=colour, marker=marker, markerfacecolor=face)


def _draw_missing(place: Axes, point: MissingPoint, letter: str) -> None:
    """A cross on the axis, with the reason below the panel: there is a size, and no efficiency."""
    text = f"{letter}  {point.num_gpus} GPUs, no number: {missing_text(point)}"
    place.plot(
        [point.num_gpus],
        [place.get_ylim()[0]],
        color=_MISSING_COLOUR,
        marker="x",
        linestyle="none",
        clip_on=False,
        label=textwrap.fill(text, _NAME_WIDTH),
    )


def _write_letters(place: Axes, curves: Sequence[Curve]) -> None:
    """A letter behind every curve's last point, moved up where two would lie on each other."""
    low, high = place.get_ylim()
    ends = sorted(
        (one.efficiency_ratio * 100, curve_letter(index), one.point.num_gpus)
        for index, one in enumerate(curve.efficiencies[-1] for curve in curves)
    )
    lowest = low
    for percent, letter, num_gpus in ends:
        lowest = max(percent, lowest)
        place.annotate(
            letter, (num_gpus, lowest), (7, 0), textcoords="offset points", fontsize=8, va="center"
        )
        lowest += (high - low) * 0.05


def _low_pct(one: Efficiency) -> float:
    return (one.efficiency_ratio if one.low_ratio is None else one.low_ratio) * 100


def _top_pct(one: Efficiency) -> float:
    return (one.efficiency_ratio if one.high_ratio is None else one.high_ratio) * 100 + 2
