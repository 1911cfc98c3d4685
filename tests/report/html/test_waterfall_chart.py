"""Bars of a waterfall stand end to end and cover the step."""

from __future__ import annotations

import itertools

import pytest

from moe_bench.projection.forecast import forecast
from moe_bench.report.html.chart import RIGHT_PX
from moe_bench.report.html.projections import doublings, projections
from moe_bench.report.html.waterfall_chart import LEFT_PX, MIN_BAR_PX, ROLES, waterfall_chart
from tests.report.pages import DEEPSEEK, QWEN, recipe
from tests.results.records import LOADER


@pytest.mark.parametrize("name", [DEEPSEEK, QWEN])
def test_each_bar_begins_where_the_one_above_ends_and_the_last_ends_at_the_step(name: str) -> None:
    made = forecast(recipe(name))
    bars = waterfall_chart("waterfall", made).marks
    assert len(bars) == len(made.projection.terms)
    assert bars[0].x_px == LEFT_PX
    for above, below in itertools.pairwise(bars):
        assert below.y_px > above.y_px
        assert below.x_px == pytest.approx(above.x_px + above.width_px, abs=MIN_BAR_PX)
    assert bars[-1].x_px + bars[-1].width_px == pytest.approx(RIGHT_PX, abs=MIN_BAR_PX)
    assert {bar.role for bar in bars} <= set(ROLES)


def test_a_recipe_that_cannot_be_projected_is_named_and_the_others_are_shown() -> None:
    host = recipe(QWEN).model_copy(update={"system": LOADER.system("cpu_host")})
    found = projections([host, recipe(DEEPSEEK)])
    assert set(found.refused) == {host.name}
    assert set(found.waterfalls) == set(found.pipeline_pictures) == {DEEPSEEK}
    assert [point.num_gpus for point in found.points] == list(doublings(recipe(DEEPSEEK)))
    assert found.points[0].label == DEEPSEEK


def test_sizes_double_from_the_recipes_own_to_the_largest() -> None:
    assert doublings(recipe(DEEPSEEK)) == (256, 512, 1024, 2048, 4096, 8192, 16384)
