"""Whether two curves of training differ by more than rounding, judged by runs that differ by it alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

CONFIDENCE_FRACTION = 0.999
"""Of each step: a verdict is over tens of steps, and `differs` must mean something."""
FLOOR_FRACTION = 2.0**-20
"""Of the value: sixteen roundings of FP32, in which the losses of tokens are added up in any order."""
MIN_REPEATS = 2


def curve_tolerances(base: Sequence[float], repeats: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """By how much another run of the same computation may be off at each step, in the unit of the curves.

    tolerance_t = max(t_R max_{s <= t} sqrt(sum_r (l_rs - l_s)^2 / R), floor l_t)

    Differences of R repeats from `base` are taken as draws around zero, so their mean square has R degrees of
    freedom, and Student's t of as many says how far another draw can be. Rounding differences grow as
    training goes on and do not shrink for good: hence the largest so far.

    Raises ValueError with fewer than MIN_REPEATS repeats or curves of unequal length.
    """
    if len(repeats) < MIN_REPEATS:
        raise ValueError(f"{len(repeats)} repeats say nothing about their spread; {MIN_REPEATS} at least")
    quantile = t_quantile(len(repeats), CONFIDENCE_FRACTION)
    worst = 0.0
    found = []
    for value, *others in zip(base, *repeats, strict=True):
        worst = max(worst, math.sqrt(math.fsum((one - value) ** 2 for one in others) / len(others)))
        found.append(max(quantile * worst, FLOOR_FRACTION * abs(value)))
    return tuple(found)


@cache
def t_quantile(freedom: int, confidence_fraction: float) -> float:
    """The t within which Student's t of `freedom` degrees lies with this probability, on both sides of zero.

    t = sqrt(freedom) tan(theta), where A(theta) is the probability. By bisection: verbs that must start at
    once read verdicts, and scipy takes longer to load than all else that they do.
    """
    low, high = 0.0, math.pi / 2
    while (middle := (low + high) / 2) not in (low, high):
        if _probability_within(middle, freedom) < confidence_fraction:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _probability_within(theta: float, freedom: int) -> float:
    """A(t | n) with theta = arctan(t / sqrt(n)) (Abramowitz and Stegun, 26.7.3 and 26.7.4).

    n even: sin (1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 + ... cos^(n-2))
    n odd:  2/pi (theta + sin (cos + 2/3 cos^3 + ... cos^(n-2))), for n = 1 without what stands behind theta
    """
    cosine, is_odd = math.cos(theta), freedom % 2
    term, total = (cosine, 0.0) if is_odd else (1.0, 0.0)
    for power in range(is_odd, freedom - 1, 2):
        total += term
        term *= cosine * cosine * (power + 1) / (power + 2)
    return 2 / math.pi * (theta + math.sin(theta) * total) if is_odd else math.sin(theta) * total


def first_difference(
    base: Sequence[float], variant: Sequence[float], tolerances: Sequence[float]
) -> int | None:
    """Index of the first step in which the two are further apart than is tolerated; None if there is none."""
    steps = zip(base, variant, tolerances, strict=True)
    return next((i for i, (one, other, most) in enumerate(steps) if not abs(one - other) <= most), None)
