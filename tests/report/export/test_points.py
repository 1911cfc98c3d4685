"""Curves of a record by hand: which steps they cover, when those were, and what their values are."""

import pytest

from moe_bench.report.export.points import points
from moe_bench.results.metrics import run_metrics
from tests.results.records import full, record

FOUND = record(full(), step_times_s=((2.0, 4.0, 2.0), *((1.0, 1.0, 1.0),) * 7))
"""One warm-up step of a second, then three timed ones that rank 0 makes slow."""
START_S = 1795330800.0
"""2026-11-22T07:00:00Z."""


def curve(tag: str) -> list[tuple[int, float, float]]:
    return [(one.step, one.time_s - START_S, one.value) for one in points(FOUND) if one.tag == tag]


def test_losses_and_norms_cover_all_steps_and_stand_at_their_ends() -> None:
    assert curve("loss") == [(0, 1.0, 6.3), (1, 3.0, 6.2), (2, 7.0, 6.1), (3, 9.0, 6.0)]
    assert [step for step, _, _ in curve("grad_norm")] == [0, 1, 2, 3]


def test_step_times_are_those_of_the_slowest_rank_with_warm_up_apart() -> None:
    assert curve("warmup/step_time_s") == [(0, 1.0, 1.0)]
    assert [(step, value) for step, _, value in curve("step_time_s")] == [(1, 2.0), (2, 4.0), (3, 2.0)]


def test_rates_are_the_inverse_of_step_times_and_agree_with_the_table() -> None:
    tokens = FOUND.plan.recipe.tokens_per_step / 8
    assert [value for _, _, value in curve("tokens_per_s_per_gpu")] == [tokens / 2, tokens / 4, tokens / 2]
    metrics = run_metrics(FOUND)  # the median step takes 2 s
    assert curve("tflops_per_gpu")[0][2] == pytest.approx(metrics.flops_per_s_per_gpu / 1e12)


def test_loads_have_one_value_per_timed_step_and_memory_one_per_run() -> None:
    assert [(step, value) for step, _, value in curve("max_over_mean_load_ratio")] == [
        (1, 1.5),
        (2, 1.5),
        (3, 1.5),
    ]
    ((step, _, value),) = curve("peak_memory_gib")
    assert (step, value) == (3, pytest.approx(1.0, abs=1e-6))
