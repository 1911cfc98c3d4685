"""Whether two loss curves differ by more than rounding, judged by runs that differ by rounding alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

CONFIDENCE_FRACTION = 0.999
"""Of each step: a verdict is over tens of steps, and `differs` must mean something."""
FLOOR_FRACTION = 2.0**-20
"""Of the loss: sixteen roundings of FP32, in which the losses of tokens are added up in any order."""
MIN_REPEATS = 2


def loss_tolerances(base: Sequence[float], repeats: Sequence[Sequence[float]]) -> tuple[float, ...]:
    """By how much another run of the same computation may be off at each step, in the unit of the losses.

    tolerance_t = max(t_R max_{s <= t} sqrt(sum_r (l_rs - l_s)^2 / R), floor l_t)

    Differences of R repeats from `base` are taken as draws around zero, so their mean square has R degrees of
    freedom, and Student's t of as many says how far another draw can be. Rounding differences grow as
    training goes on and do not shrink for good: hence the largest so far.

    Raises ValueError with fewer than MIN_REPEATS repeats or curves of unequal length.
    """
    # scipy takes longer to import than everything else that verbs which only read do
    from scipy.special import stdtrit

    if len(repeats) < MIN_REPEATS:
        raise ValueError(f"{len(repeats)} repeats say nothing about their spread; {MIN_REPEATS} at least")
    quantile = float(stdtrit(len(repeats), (1 + CONFIDENCE_FRACTION) / 2))
    worst = 0.0
    found = []
    for loss, *others in zip(base, *repeats, strict=True):
        worst = max(worst, math.sqrt(math.fsum((one - loss) ** 2 for one in others) / len(others)))
        found.append(max(quantile * worst, FLOOR_FRACTION * abs(loss)))
    return tuple(found)


def first_difference(
    base: Sequence[float], variant: Sequence[float], tolerances: Sequence[float]
) -> int | None:
    """Index of the first step in which the two are further apart than is tolerated; None if there is none."""
    steps = zip(base, variant, tolerances, strict=True)
    return next((i for i, (one, other, most) in enumerate(steps) if not abs(one - other) <= most), None)
