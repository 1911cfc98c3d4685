"""Writes one chart of the report as an SVG file of its own, light or dark as the viewer's system is."""

from __future__ import annotations

from pathlib import Path

from moe_bench.report.html.chart import Chart
from moe_bench.report.html.rendering import template


def chart_svg(chart: Chart) -> str:
    """The chart with its title and legend, styles inside; nothing is fetched. Raises ValueError for cells."""
    if chart.cells is not None:
        raise ValueError(f"chart {chart.key}: cells are not XML, for they are written without quotes")
    return template("alone.svg.j2").render(chart=chart).strip() + "\n"


def write_chart(chart: Chart, path: Path) -> None:
    """Write `chart` to `path`."""
    path.write_text(chart_svg(chart), encoding="utf-8")
