"""Medians and intervals of step times, slow ranks and outliers."""

import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.analysis.stats import SteadyState, median_interval, outliers, slowest_ranks, steady_state

times = st.lists(st.floats(0.1, 100), min_size=1, max_size=30)


@given(samples=times)
def test_the_median_lies_in_its_interval_and_the_interval_in_the_samples(samples: list[float]) -> None:
    interval = median_interval(samples, num_resamples=50)
    assert min(samples) <= interval.low_s <= interval.high_s <= max(samples)
    if len(set(samples)) == 1:
        assert interval.low_s == interval.median_s == interval.high_s


def test_the_same_seed_gives_the_same_interval_and_another_seed_another() -> None:
    samples = [1.0 + 0.37 * step % 0.1 for step in range(40)]
    assert median_interval(samples, seed=3) == median_interval(samples, seed=3)
    assert median_interval(samples, seed=3, num_resamples=30) != median_interval(
        samples, seed=4, num_resamples=30
    )


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    generator = random.Random(11)
    covered = 0
    for trial in range(200):
        samples = [generator.gauss(1.0, 0.05) for _ in range(40)]
        interval = median_interval(samples, num_resamples=200, seed=trial)
        covered += interval.low_s <= 1.0 <= interval.high_s
    assert 0.90 <= covered / 200 <= 0.99


def test_one_slow_step_does_not_move_the_median() -> None:
    assert median_interval([1.0] * 20 + [60.0]).median_s == 1.0


def test_no_samples_are_no_measurement() -> None:
    with pytest.raises(ValueError, match="no samples"):
        median_interval([])


def test_the_slowest_rank_of_each_step_sets_its_time() -> None:
    slowest = slowest_ranks([[1.0, 2.0, 1.0], [1.5, 1.0, 1.0]])
    assert [(step.step_time_s, step.rank) for step in slowest] == [(1.5, 1), (2.0, 0), (1.0, 0)]


def test_ranks_with_different_numbers_of_steps_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        slowest_ranks([[1.0, 2.0], [1.0]])


def test_a_far_step_is_marked_and_noise_is_not() -> None:
    samples = [1.00, 1.01, 0.99, 1.02, 0.98, 1.00, 1.01, 2.50]
    assert outliers(samples) == (False,) * 7 + (True,)
    assert outliers([]) == ()


def test_steps_that_settle_are_steady_from_the_window_at_which_they_have() -> None:
    # windows of five: 2.0 1.5 1.2 1.1 1.0 has median 1.2; the one from step 2 on has median 1.0
    samples = [2.0, 1.5, 1.2, 1.1, 1.0, *[1.0] * 25]
    assert steady_state(samples) == SteadyState(first_step=2, has_settled=True)


def test_quiet_steps_are_steady_from_the_first() -> None:
    assert steady_state([1.0] * 10) == SteadyState(first_step=0, has_settled=True)


def test_one_slow_step_does_not_end_a_steady_state() -> None:
    samples = [1.0] * 40
    samples[20] = 9.0
    assert steady_state(samples) == SteadyState(first_step=0, has_settled=True)


@pytest.mark.parametrize("samples", [[1 + 0.01 * step for step in range(40)], [1.0] * 30 + [1.1] * 10])
def test_a_drift_or_a_late_change_has_not_settled(samples: list[float]) -> None:
    assert steady_state(samples) == SteadyState(first_step=0, has_settled=False)


def test_too_few_steps_cannot_tell() -> None:
    assert steady_state([3.0, 1.0, 1.0, 1.0, 1.0]) == SteadyState(first_step=0, has_settled=None)


def test_noise_is_seldom_taken_for_a_drift() -> None:
    generator = random.Random(5)
    found = [steady_state([generator.gauss(1.0, 0.1) for _ in range(40)]) for _ in range(300)]
    assert sum(steady.has_settled is False for steady in found) <= 6
    assert sum(steady.first_step > 0 for steady in found) <= 9


@pytest.mark.parametrize("num_samples", [1, 2, 7, 20])
def test_the_interval_is_that_of_the_medians_of_resamples(num_samples: int) -> None:
    samples = sorted(random.Random(num_samples).gauss(1, 0.1) for _ in range(num_samples))
    generator = random.Random(5)
    medians = sorted(statistics.median(generator.choices(samples, k=num_samples)) for _ in range(41))
    interval = median_interval(samples[::-1], num_resamples=41, seed=5)
    # one of 41 medians is cut off at either end
    assert (interval.low_s, interval.high_s) == (medians[1], medians[-2])
    assert interval.median_s == statistics.median(samples)
