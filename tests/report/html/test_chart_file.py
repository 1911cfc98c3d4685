"""A chart on its own is well-formed SVG with everything that it needs inside."""

import dataclasses
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from moe_bench.projection.schedule.simulation import ScheduleKind
from moe_bench.report.html.chart import Cells
from moe_bench.report.html.chart_file import chart_svg, write_chart
from moe_bench.report.html.pipeline_picture import pipeline_picture
from tests.projection.schedule.test_simulation import equal_chunks

SVG = "{http://www.w3.org/2000/svg}"


def test_a_chart_file_has_all_marks_the_legend_and_nothing_to_fetch(tmp_path: Path) -> None:
    chart = pipeline_picture("x", equal_chunks(ScheduleKind.DUAL_PIPE_V, 4, 2, 8))
    write_chart(chart, tmp_path / "pipeline.svg", subject="deepseek_v3/a")
    root = ET.fromstring((tmp_path / "pipeline.svg").read_text())
    rects = list(root.iter(f"{SVG}rect"))
    assert sum("mark" in rect.get("class", "").split() for rect in rects) == len(chart.marks)
    texts = {text.text for text in root.iter(f"{SVG}text")}
    assert {chart.title, "deepseek_v3/a"} <= texts
    assert {entry.text for entry in chart.legend} <= texts
    assert not {name for one in root.iter() for name in one.attrib if "href" in name or name == "src"}


def test_a_chart_of_cells_is_refused() -> None:
    chart = pipeline_picture("x", equal_chunks(ScheduleKind.ONE_F_ONE_B, 2, 1, 2))
    cells = Cells(rows=((1,),), x_px=0, y_px=0, cell_width_px=1, cell_height_px=1)
    with pytest.raises(ValueError, match="cells are not XML"):
        chart_svg(dataclasses.replace(chart, cells=cells), subject="x")
