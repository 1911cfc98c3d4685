"""Ticks are round, cover the data, and stand where the values are."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.report.html.axis import linear, log_ticks, logarithmic, number, round_range, ticks, whole_ticks

VALUES = st.floats(min_value=1e-6, max_value=1e9)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 79.1, (0, 20, 40, 60, 80)),
        (0.86, 1.067, (0.8, 0.9, 1.0, 1.1)),
        (19.8, 27.76, (18, 20, 22, 24, 26, 28)),
        (5, 5, (5.0, 5.2, 5.4, 5.6)),
    ],
)
def test_a_range_is_covered_in_round_steps(low: float, high: float, expected: tuple[float, ...]) -> None:
    assert round_range(low, high) == pytest.approx(expected)


@given(VALUES, VALUES)
def test_round_values_cover_any_range_with_few_steps(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    values = round_range(low, high)
    slack = (values[-1] - values[0]) * 1e-6
    assert values[0] <= low + slack
    assert values[-1] >= high - slack
    assert 2 <= len(values) <= 7


@given(VALUES, VALUES)
def test_logarithmic_ticks_cover_any_range(one: float, other: float) -> None:
    low, high = min(one, other), max(one, other)
    values = log_ticks(low, high)
    assert values[0] <= low * 1.001
    assert values[-1] >= high * 0.999
    assert len(values) >= 2


def test_logarithmic_ticks_thin_out_over_many_decades() -> None:
    assert log_ticks(1000, 40_000) == (1000, 2000, 5000, 10_000, 20_000, 50_000)
    assert log_ticks(170, 40_000) == (100, 300, 1000, 3000, 10_000, 30_000, 100_000)


def test_places_are_proportional_to_differences_or_to_ratios() -> None:
    assert linear(10, 20, start_px=100, end_px=0)(12.5) == pytest.approx(75)
    doubling = logarithmic(8, 64, start_px=0, end_px=300)
    assert [doubling(size) for size in (8, 16, 32, 64)] == pytest.approx([0, 100, 200, 300])


def test_whole_numbers_begin_with_the_first() -> None:
    assert whole_ticks(1, 5) == (1, 2, 3, 4, 5)
    assert whole_ticks(0, 255) == (0, 50, 100, 150, 200, 250)
    assert whole_ticks(1, 40) == (1, 5, 10, 15, 20, 25, 30, 35, 40)
    assert whole_ticks(3, 3) == (3,)


def test_ticks_of_an_axis_have_equally_many_decimals_and_0_none() -> None:
    labels = {
        (5.969, 5.97, 5.971): ["5.969", "5.970", "5.971"],
        (0, 0.5, 1): ["0", "0.5", "1.0"],
        (1000, 2000, 30_000): ["1,000", "2,000", "30,000"],
        (1e-6, 2e-6): ["1e-06", "2e-06"],
    }
    for values, expected in labels.items():
        assert [tick.label for tick in ticks(values, float)] == expected


def test_numbers_are_written_without_noise() -> None:
    assert [number(value) for value in (0.1 + 0.2, 12_000.0, 5.0)] == ["0.3", "12,000", "5"]
