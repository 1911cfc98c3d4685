"""The picture shows every pass where there is room, and the right shares of time where there is not."""

import pytest

from moe_bench.projection.schedule.simulation import ScheduleKind, Timeline
from moe_bench.report.html.chart import LEFT_PX, RIGHT_PX, Mark
from moe_bench.report.html.pipeline_picture import PASSES, binned_fractions, pipeline_picture
from tests.projection.schedule.test_simulation import equal_chunks

SMALL = equal_chunks(ScheduleKind.INTERLEAVED, 4, 2, 8)
LARGE = equal_chunks(ScheduleKind.INTERLEAVED, 16, 4, 64)


def area_px(marks: tuple[Mark, ...]) -> float:
    return sum(mark.width_px * mark.height_px for mark in marks)


def test_a_small_pipeline_is_drawn_pass_by_pass() -> None:
    chart = pipeline_picture("x", SMALL)
    assert len(chart.marks) == 4 * 2 * 8 * 2
    last = max(chart.marks, key=lambda mark: mark.x_px + mark.width_px)
    assert last.role == "backward"
    assert last.x_px + last.width_px == pytest.approx(RIGHT_PX)
    assert last.tip == "rank 0: backward pass, chunk 0, micro batch 7"


@pytest.mark.parametrize("timeline", [SMALL, LARGE], ids=["small", "large"])
def test_the_bars_cover_the_busy_share_of_the_rows(timeline: Timeline) -> None:
    chart = pipeline_picture("x", timeline)
    rows_px = sum(band.width_px * band.height_px for band in chart.bands)
    assert area_px(chart.marks) / rows_px == pytest.approx(1 - timeline.bubble_fraction, abs=0.01)
    for mark in chart.marks:
        assert LEFT_PX - 0.01 <= mark.x_px <= mark.x_px + mark.width_px <= RIGHT_PX + 0.01
        band = next(one for one in chart.bands if one.y_px - 0.01 <= mark.y_px <= one.y_px + one.height_px)
        assert mark.y_px + mark.height_px <= band.y_px + band.height_px + 0.01


def test_a_pipeline_of_thousands_of_passes_stays_small_enough_to_read() -> None:
    chart = pipeline_picture("x", LARGE)
    assert len(chart.bands) == 16
    assert len(chart.marks) < 1500 < 2 * 16 * 4 * 64
    assert chart.height_px < 300


def test_binning_loses_no_time() -> None:
    slots = list(LARGE.slots(3))
    fractions = binned_fractions(slots, num_bins=60, total_s=LARGE.total_s)
    busy_s = sum(sum(row) for row in fractions.values()) * LARGE.total_s / 60
    assert busy_s == pytest.approx(LARGE.busy_s[3])
    for place in range(60):
        assert sum(fractions[role][place] for role in PASSES) <= 1 + 1e-9


def test_the_table_has_the_busy_and_the_idle_time_of_every_rank() -> None:
    chart = pipeline_picture("x", SMALL)
    assert chart.data.headings[:3] == ("pipeline rank", "busy (ms)", "idle (ms)")
    assert [row[0] for row in chart.data.rows] == ["0", "1", "2", "3"]
    assert {row[1:4] for row in chart.data.rows} == {("48000.0", "9000.0", "15.8%")}
