"""Tolerances by hand, and which step is the first beyond them."""

from __future__ import annotations

import math

import pytest
from scipy.special import stdtrit

from moe_bench.analysis.loss_parity import (
    FLOOR_FRACTION,
    curve_tolerances,
    first_difference,
    t_quantile,
)

T_TWO = 31.5991
"""Student's t of two degrees of freedom, 99.9 % two-sided (any printed table)."""


def test_a_tolerance_is_students_t_times_the_largest_spread_so_far() -> None:
    found = curve_tolerances([4.0, 3.0, 2.0], [[4.0, 3.3, 2.0], [4.0, 2.6, 2.1]])
    spread = math.sqrt((0.3**2 + 0.4**2) / 2)
    assert found == pytest.approx((4.0 * FLOOR_FRACTION, T_TWO * spread, T_TWO * spread), rel=1e-4)


def test_repeats_that_are_the_same_to_the_bit_leave_the_roundings_of_the_sum() -> None:
    assert curve_tolerances([4.0, 2.0], [[4.0, 2.0]] * 3) == (4.0 / 2**20, 2.0 / 2**20)


def test_one_repeat_says_nothing() -> None:
    with pytest.raises(ValueError, match="1 repeats say nothing"):
        curve_tolerances([4.0], [[4.0]])


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 31])
def test_students_t_is_scipys(freedom: int) -> None:
    assert t_quantile(freedom, 0.999) == pytest.approx(float(stdtrit(freedom, 0.9995)), rel=1e-9)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [([3.0, 2.0, 1.0], None), ([3.1, 2.1, 1.1], None), ([3.0, 2.2, 1.0], 1), ([3.0, 2.0, math.nan], 2)],
)
def test_the_first_step_beyond_its_tolerance_is_named(variant: list[float], expected: int | None) -> None:
    assert first_difference([3.0, 2.0, 1.0], variant, [0.11, 0.11, 0.11]) == expected
