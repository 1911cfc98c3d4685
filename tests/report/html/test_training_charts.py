"""What the charts of a training run draw: every step once, and of the experts the worst, never a mean."""

import itertools
import math
from statistics import fmean

import pytest

from moe_bench.report.html.training_charts import (
    MAX_POINTS,
    entropy_chart,
    evenness,
    loss_chart,
    training_charts,
    training_load_grid,
)
from tests.report.pages import training_run


def test_losses_stand_at_their_steps_and_lower_ones_lower() -> None:
    run = training_run()
    chart = loss_chart("loss", run.log)
    training = [mark for mark in chart.marks if mark.role == "training"]
    assert [mark.tip for mark in training][:2] == ["step 1: 6.0000, training", "step 2: 4.0000, training"]
    assert [mark.y_px for mark in training] == sorted(mark.y_px for mark in training)
    gaps = {round(right.x_px - left.x_px, 6) for left, right in itertools.pairwise(training)}
    assert len(gaps) == 1
    assert chart.data.rows[3] == ("step 4", "3.0000", "3.5000")
    assert [mark.x_px for mark in chart.marks if mark.role == "validation"] == [
        training[step - 1].x_px for step in (4, 8, 12)
    ]


def test_a_long_run_is_drawn_as_means_that_cover_every_step() -> None:
    run = training_run(num_steps=1003)
    chart = loss_chart("loss", run.log)
    rows = [row for row in chart.data.rows if row[1] != "-"]
    assert len(rows) <= MAX_POINTS
    assert (rows[0][0], rows[-1][0]) == ("steps 1 to 6", "step 1003")
    assert rows[0][1] == f"{fmean(line.loss for line in run.log[:6]):.4f}"
    # 250 validations, two in each mark: none is left out, and no row is of both curves
    held_out = [row for row in chart.data.rows if row[2] != "-"]
    assert len(held_out) == 125
    assert held_out[0] == ("steps 4 to 8", "-", f"{fmean((3.5, 3.0)):.4f}")
    assert "the mean of 6 training steps" in chart.caption
    assert "the mean of 2 validations" in chart.caption


def test_the_least_even_layer_is_drawn_with_its_name_and_alarm() -> None:
    windows = evenness(training_run().health)
    # three of four experts alike: ln 3 / ln 4
    assert windows[2].low_fraction == pytest.approx(math.log(3) / math.log(4))
    assert (windows[2].low_layer, windows[2].high_fraction) == ("decoder.2", 1)
    chart = entropy_chart("entropy", windows)
    assert [mark.role for mark in chart.marks] == ["steady"] * 3 + ["outlier"] + ["steady"] * 2
    assert chart.marks[3].tip == "steps 7 to 8: 0.7925 of decoder.2, an alarm"


def test_windows_that_share_a_mark_keep_the_worst_of_them_and_all_alarms() -> None:
    run = training_run(num_steps=4 * MAX_POINTS)
    windows = evenness(run.health)
    assert len(run.health) == 2 * MAX_POINTS
    assert len(windows) == MAX_POINTS
    assert (windows[0].first_step, windows[-1].last_step) == (1, 4 * MAX_POINTS)
    # steps 5 to 6 are uneven: the second window of the pair decides
    assert [one.low_fraction < 1 for one in windows[:3]] == [False, True, True]
    assert sum(one.num_alarms for one in windows) == sum(len(line.alarms) for line in run.health) == 1


def test_layers_without_a_token_have_no_entropy() -> None:
    (line, *_) = training_run().health
    silent = tuple(layer.model_copy(update={"tokens_per_expert": (0, 0)}) for layer in line.layers)
    assert evenness([line.model_copy(update={"layers": silent})]) == ()


def test_the_heat_map_is_that_of_the_last_window_with_the_names_of_its_layers() -> None:
    chart = training_load_grid("experts", training_run().health[-1])
    assert chart.cells is not None
    # 10 of 30 tokens of four experts are 4/3 of the mean
    assert chart.cells.rows == ((4, 4, 4, 4), (6, 6, 6, 0))
    assert chart.data.rows[1] == ("1 (decoder.2)", "0", "1.333", "3", "0.000")
    assert chart.caption.endswith("steps 11 to 12.")


def test_a_run_before_its_first_step_has_no_charts() -> None:
    assert list(training_charts(0, (), ())) == []
