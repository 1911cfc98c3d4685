"""Ratios of throughputs with known answers, and what may be claimed from them."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.analysis.equivalence import (
    Claim,
    RatioInterval,
    claim,
    ratio_between,
    ratio_to_value,
    runs_to_decide,
)


def interval(low: float, high: float, **changes: object) -> RatioInterval:
    fields: dict[str, object] = {
        "estimate_ratio": math.sqrt(low * high),
        "low_ratio": low,
        "high_ratio": high,
        "basis": "runs",
        "num_runs": 3,
        "log_std": 0.01,
    }
    return RatioInterval(**{**fields, **changes})  # type: ignore[arg-type]


def runs(median_s: float, *, num_runs: int, spread: float, seed: int = 7) -> list[list[float]]:
    """Runs of 20 quiet steps whose medians scatter by `spread`."""
    generator = random.Random(seed)
    levels = [median_s * math.exp(generator.gauss(0, spread)) for _ in range(num_runs)]
    return [[level * generator.gauss(1, 0.001) for _ in range(20)] for level in levels]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.96, 1.04, Claim.SAME),
        (0.95, 1.05, Claim.SAME),
        (1.01, 1.04, Claim.SAME),
        (1.01, 1.06, Claim.FASTER),
        (1.20, 1.30, Claim.FASTER),
        (0.90, 0.99, Claim.SLOWER),
        (0.94, 1.01, Claim.INCONCLUSIVE),
        (0.97, 1.06, Claim.INCONCLUSIVE),
    ],
)
def test_a_claim_follows_from_where_the_interval_lies(low: float, high: float, expected: Claim) -> None:
    assert claim(interval(low, high)) is expected


def test_without_an_interval_nothing_is_claimed() -> None:
    assert claim(None) is Claim.INCONCLUSIVE
    assert runs_to_decide(None) == 2


def test_three_runs_match_students_t_by_hand() -> None:
    # ln ratios 0, 0.01, 0.02: mean 0.01, s 0.01, t(0.975, 2) = 4.3027, half width 4.3027 x 0.01 / sqrt(3)
    found = ratio_to_value([[math.exp(-x)] for x in (0.0, 0.01, 0.02)], value_s=1.0)
    assert found is not None
    assert found.basis == "runs"
    assert math.log(found.estimate_ratio) == pytest.approx(0.01)
    assert math.log(found.high_ratio) - 0.01 == pytest.approx(4.3027 * 0.01 / math.sqrt(3), rel=1e-4)
    assert found.log_std == pytest.approx(0.01)


def test_two_and_two_runs_match_welch_by_hand() -> None:
    # medians 1.00, 1.02 and 0.50, 0.50: one side has no spread, so 1 degree of freedom, t = 12.706
    found = ratio_between([[1.0], [1.02]], [[0.5], [0.5]])
    assert found is not None
    log_std = math.log(1.02) / math.sqrt(2)
    assert math.log(found.estimate_ratio) == pytest.approx(math.log(2) + math.log(1.02) / 2)
    half = math.log(found.high_ratio / found.estimate_ratio)
    assert half == pytest.approx(12.7062 * log_std / math.sqrt(2), rel=1e-4)


def test_runs_without_any_spread_give_a_point() -> None:
    found = ratio_between([[2.0], [2.0]], [[1.0], [1.0]])
    assert found is not None
    assert (found.low_ratio, found.estimate_ratio, found.high_ratio) == pytest.approx((2, 2, 2))


def test_a_quiet_run_at_the_published_speed_is_the_same() -> None:
    assert claim(ratio_to_value(runs(1.0, num_runs=3, spread=0.002), value_s=1.0)) is Claim.SAME
    assert claim(ratio_to_value(runs(1.0, num_runs=1, spread=0.0), value_s=1.0)) is Claim.SAME


def test_quiet_runs_at_another_speed_are_faster_or_slower() -> None:
    assert claim(ratio_to_value(runs(0.8, num_runs=3, spread=0.002), value_s=1.0)) is Claim.FASTER
    assert claim(ratio_to_value(runs(1.2, num_runs=3, spread=0.002), value_s=1.0)) is Claim.SLOWER


def test_noisy_runs_decide_nothing_until_there_are_as_many_as_were_asked_for() -> None:
    spread = 0.05
    few = ratio_to_value(runs(1.0, num_runs=3, spread=spread), value_s=1.0)
    assert claim(few) is Claim.INCONCLUSIVE
    needed = runs_to_decide(interval(0.9, 1.1, estimate_ratio=1.0, log_std=spread))
    # t(0.975, n - 1) x 0.05 / sqrt(n) <= ln 1.05 = 0.0488 first at n = 7: 2.4469 x 0.05 / sqrt(7) = 0.0462
    assert needed == 7
    many = ratio_to_value(runs(1.0, num_runs=2 * needed, spread=spread), value_s=1.0)
    assert claim(many) is Claim.SAME


def test_a_noisy_single_run_of_the_same_speed_decides_nothing() -> None:
    generator = random.Random(3)
    noisy = [generator.gauss(1.0, 0.3) for _ in range(20)]
    found = ratio_to_value([noisy], value_s=1.0)
    assert found is not None
    assert found.basis == "steps"
    assert claim(found) is Claim.INCONCLUSIVE
    assert runs_to_decide(found) > 2


def test_a_single_run_of_few_steps_has_no_interval() -> None:
    assert ratio_to_value([[1.0] * 9], value_s=1.0) is None
    assert ratio_between([[1.0] * 20], [[1.0] * 9]) is None


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        ratio_to_value([], value_s=1.0)
    with pytest.raises(ValueError, match="at least one run"):
        ratio_between([[1.0]], [[]])


def test_intervals_between_runs_cover_the_truth_about_as_often_as_they_say() -> None:
    covered = 0
    for trial in range(300):
        found = ratio_between(
            runs(1.0, num_runs=4, spread=0.03, seed=2 * trial),
            runs(0.9, num_runs=4, spread=0.03, seed=2 * trial + 1),
        )
        assert found is not None
        covered += found.low_ratio <= 1 / 0.9 <= found.high_ratio
    assert 0.92 <= covered / 300 <= 0.98


@given(
    base=st.lists(st.floats(0.5, 2), min_size=2, max_size=5),
    new=st.lists(st.floats(0.5, 2), min_size=2, max_size=5),
)
def test_swapping_the_sides_inverts_the_ratio_and_its_interval(base: list[float], new: list[float]) -> None:
    there = ratio_between([[x] for x in base], [[x] for x in new])
    back = ratio_between([[x] for x in new], [[x] for x in base])
    assert there is not None
    assert back is not None
    assert there.estimate_ratio == pytest.approx(1 / back.estimate_ratio)
    assert there.low_ratio == pytest.approx(1 / back.high_ratio)


def test_a_single_run_is_taken_to_scatter_like_the_runs_of_the_other_side() -> None:
    # medians 1, e^0.01 and e^0.02: s = 0.01; half width t(0.975, 2) x 0.01 x sqrt(1 + 1/3)
    base = [[1.0], [math.exp(0.01)], [math.exp(0.02)]]
    found = ratio_between(base, [[1.0]])
    assert found is not None
    assert (found.basis, found.num_runs) == ("runs", 1)
    assert math.log(found.estimate_ratio) == pytest.approx(0.01)
    assert math.log(found.high_ratio) - 0.01 == pytest.approx(4.3027 * 0.01 * math.sqrt(4 / 3), rel=1e-4)
    assert found.log_std == pytest.approx(0.01 * math.sqrt(2))
    back = ratio_between([[1.0]], base)
    assert back is not None
    assert back.num_runs == 3
    assert back.high_ratio == pytest.approx(1 / found.low_ratio)


def test_a_new_run_inside_the_scatter_of_the_baseline_is_not_slower() -> None:
    # its steps alone are quiet, and would call 6 % slower
    baseline = [[level] * 20 for level in (1.0, 1.06, 0.94)]
    assert claim(ratio_between(baseline, [[1.06] * 20])) is Claim.INCONCLUSIVE


def test_one_run_each_is_judged_by_its_steps() -> None:
    runs_s = [[1.0 + step / 1000 for step in range(-10, 11)]]
    found = ratio_between([[2 * time_s for time_s in runs_s[0]]], runs_s)
    assert found is not None
    assert found.basis == "steps"
    assert found.estimate_ratio == pytest.approx(2.0)
    assert 1.98 < found.low_ratio < 2.0 < found.high_ratio < 2.02
