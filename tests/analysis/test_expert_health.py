"""Loads of experts counted by hand."""

from __future__ import annotations

import math

import pytest

from moe_bench.analysis.expert_health import (
    default_alarm_share_fraction,
    dropped_fraction,
    load_entropy_fraction,
)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ((5, 5, 5, 5), 1.0),
        ((9, 0, 0, 0), 0.0),
        ((5, 5, 0, 0), 0.5),
        # p = 1/2, 1/4, 1/4: (ln 2 / 2 + ln 4 / 2) / ln 3
        ((8, 4, 4), 1.5 * math.log(2) / math.log(3)),
        ((0, 0), None),
        ((7,), None),
    ],
)
def test_the_entropy_is_that_of_the_shares(tokens: tuple[int, ...], expected: float | None) -> None:
    found = load_entropy_fraction(tokens)
    assert found == (None if expected is None else pytest.approx(expected, abs=1e-12))


def test_what_was_chosen_and_not_taken_was_dropped() -> None:
    assert dropped_fraction(num_choices=200, num_taken=150) == 0.25


def test_the_default_share_lies_as_far_from_balance_as_from_collapse() -> None:
    found = default_alarm_share_fraction(num_experts=8, top_k=2)
    assert found == 0.5
    assert found / (2 / 8) == 1 / found
