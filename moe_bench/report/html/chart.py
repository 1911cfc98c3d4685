"""What a chart consists of, in pixels of its own drawing; the templates only write it down."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moe_bench.report.html.axis import Axis

WIDTH_PX = 380
"""Of every chart, so that text of 11.5 pixels stays above 10.5 on a phone 390 pixels wide."""
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 60, 368, 10, 40
"""Edges of the plot inside the drawing; the last is a margin, for heights differ. On the left there is room
for the axis title and ticks of five digits."""
_DOT_SIZES_PX = ((60, 3.4), (150, 2.4))
"""Up to how many marks a dot has which radius; above, _SMALL_DOT_PX."""
_SMALL_DOT_PX = 1.7

Shape = Literal["dot", "square", "diamond", "tick", "cross", "bar"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """One data point."""

    shape: Shape
    role: str
    """CSS class: what the point is, and so how it looks."""
    x_px: float
    y_px: float
    """Centre; the left upper corner of a bar."""
    tip: str
    """What it says when pointed at."""
    width_px: float = 0.0
    height_px: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Stroke:
    """A line that is not data of its own: it joins marks, spans an interval, or marks a level."""

    role: str
    points_px: tuple[tuple[float, float], ...]

    @property
    def path(self) -> str:
        """SVG path data."""
        return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in self.points_px)


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A shaded rectangle behind the marks, such as an interval."""

    role: str
    x_px: float
    y_px: float
    width_px: float
    height_px: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """Text inside the plot."""

    text: str
    x_px: float
    y_px: float
    anchor: Literal["start", "middle", "end"] = "start"
    role: str = "note"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """A grid of coloured cells; each is one data point, its colour one of a few classes."""

    rows: tuple[tuple[int, ...], ...]
    """Class of every cell."""
    x_px: float
    y_px: float
    cell_width_px: float
    cell_height_px: float

    @property
    def num_cells(self) -> int:
        """Data points."""
        return sum(len(row) for row in self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class LegendEntry:
    """One look and what it stands for."""

    role: str
    shape: Shape
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The plotted values as a table, for whoever cannot see the marks or wants the digits."""

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One figure with two axes."""

    key: str
    """Unique on the page."""
    title: str
    caption: str
    """What the reader sees in it; also its description for screen readers."""
    height_px: int
    x: Axis
    y: Axis
    data: Data
    marks: tuple[Mark, ...] = ()
    cells: Cells | None = None
    strokes: tuple[Stroke, ...] = ()
    bands: tuple[Band, ...] = ()
    notes: tuple[Note, ...] = ()
    legend: tuple[LegendEntry, ...] = ()
    left_px: int = LEFT_PX
    top_px: int = TOP_PX
    y_grid: bool = True
    x_grid: bool = False
    width_px: int = WIDTH_PX

    @property
    def bottom_px(self) -> int:
        """Lower edge of the plot."""
        return self.height_px - BOTTOM_PX

    @property
    def right_px(self) -> int:
        """Right edge of the plot."""
        return RIGHT_PX

    @property
    def dot_px(self) -> float:
        """Radius of dots, smaller where many would lie on each other."""
        return next((size for most, size in _DOT_SIZES_PX if len(self.marks) <= most), _SMALL_DOT_PX)

    @property
    def num_data_points(self) -> int:
        """What the number of marks must be."""
        return len(self.marks) + (self.cells.num_cells if self.cells else 0)


def legend_of(marks: Sequence[Mark], names: dict[str, str]) -> tuple[LegendEntry, ...]:
    """An entry for every role among `marks`, in the order of `names`."""
    shapes = {mark.role: mark.shape for mark in marks}
    return tuple(
        LegendEntry(role=role, shape=shapes[role], text=text)
        for role, text in names.items()
        if role in shapes
    )
