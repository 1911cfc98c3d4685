"""Pairs and choices counted by hand."""

from __future__ import annotations

import pytest

from moe_bench.projection.accuracy.ranking import anchored, ranking, scale_out_errors
from moe_bench.projection.accuracy.step_time import RowResult
from tests.projection.published_rows import inferred


def result(published: float, projected: float, **columns: object) -> RowResult:
    run = inferred(metrics={"tokens_per_s_per_gpu": published}, **columns)
    return RowResult(
        run=run, projected_tokens_per_s_per_gpu=projected, baseline_tokens_per_s_per_gpu=published
    )


def test_only_pairs_that_are_far_enough_apart_are_ordered() -> None:
    found = ranking([result(1000, 1000), result(1050, 900, id="near"), result(1200, 1100, id="far")])
    # 1000 and 1050 are 5 % apart; 1200 against 1000 and against 1050 are in order
    assert (found.num_pairs, found.num_ordered, found.ordered_fraction) == (2, 2, 1)


def test_a_pair_in_the_wrong_order_counts_against() -> None:
    found = ranking([result(1000, 1000), result(1200, 900, id="b")])
    assert (found.num_pairs, found.num_ordered) == (1, 0)


def test_models_and_gpus_are_never_mixed_and_precision_only_in_the_first_count() -> None:
    found = ranking(
        [
            result(1000, 1000),
            result(2000, 1500, id="b", precision="FP8-current-scaling"),
            result(3000, 100, id="c", hardware="B200"),
        ]
    )
    assert (found.num_pairs, found.num_like_pairs) == (1, 0)
    assert found.like_ordered_fraction is None


def test_regret_is_what_the_layout_projected_fastest_loses_to_the_best() -> None:
    layouts = [result(1000, 1300), result(1250, 1200, id="b", ep=4), result(800, 700, id="c", ep=2)]
    found = ranking(layouts)
    assert found.num_choices == 1
    assert found.regret_fraction == pytest.approx(1 - 1000 / 1250)


def test_repeats_of_one_layout_are_no_choice() -> None:
    found = ranking([result(1000, 1300), result(1250, 1200, id="b")])
    assert (found.num_choices, found.regret_fraction) == (0, None)


def test_an_anchor_is_another_configuration_of_the_same_release() -> None:
    alone = [result(1000, 1200), result(1000, 1200, id="b", version="NeMo 26.06 (v0.5.0, 2026-06)")]
    assert anchored(alone) is None
    pair = [result(1000, 1200), result(500, 600, id="b", num_gpus=32)]
    corrected = anchored(pair)
    assert corrected is not None
    assert corrected.num_rows == 2
    assert corrected.mape_fraction == pytest.approx(0)


def test_efficiencies_are_compared_between_rows_that_differ_in_replicas_alone() -> None:
    small = result(1000, 900)
    weak = result(950, 882, id="weak", num_gpus=32, gbs=2048)  # published 0.95, projected 0.98
    other_batch = result(500, 100, id="batch", num_gpus=64, gbs=3072)
    other_layout = result(500, 100, id="layout", num_gpus=32, gbs=2048, ep=4)
    found = scale_out_errors([small, weak, other_batch, other_layout])
    assert found is not None
    assert found.num_pairs == 1
    assert found.bias_fraction == found.mean_fraction == found.worst_fraction
    assert found.bias_fraction == pytest.approx(0.98 / 0.95 - 1)
    assert scale_out_errors([small]) is None
