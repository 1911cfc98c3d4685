"""Writes one chart of the report as an SVG file of its own, light or dark as the viewer's system is."""

from __future__ import annotations

from pathlib import Path

from moe_bench.report.html.chart import Chart
from moe_bench.report.html.rendering import template


def chart_svg(chart: Chart, *, subject: str) -> str:
    """The chart with its title, what it is of and its legend, styles inside; nothing is fetched.

    Raises ValueError for cells.
    """
    if chart.cells is not None:
        raise ValueError(f"chart {chart.key}: cells are not XML, for they are written without quotes")
    return template("alone.svg.j2").render(chart=chart, subject=subject).strip() + "\n"


def write_chart(chart: Chart, path: Path, *, subject: str) -> None:
    """Write `chart` to `path`; `subject` is the recipe that it is of, which the file alone would not say."""
    path.write_text(chart_svg(chart, subject=subject), encoding="utf-8")
