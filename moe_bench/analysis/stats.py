"""What a series of step times says: the slowest rank of each step, the median, its interval, the outliers."""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

OUTLIER_DEVIATIONS = 5.0
"""Scaled median absolute deviations beyond which a step is marked; about five sigma for normal noise."""
_NORMAL_CONSISTENCY = 1.4826
"""Factor that makes the median absolute deviation of normal samples estimate their standard deviation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MedianInterval:
    """A median and the interval in which a bootstrap finds it."""

    median_s: float
    low_s: float
    high_s: float
    confidence_fraction: float


def median_interval(
    samples_s: Sequence[float],
    *,
    confidence_fraction: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> MedianInterval:
    """Median of `samples_s` with its percentile-bootstrap interval (Efron 1979), equal for equal seeds.

    Steps are taken as independent; drift over the run makes the interval too narrow. Raises ValueError when
    there are no samples.
    """
    if not samples_s:
        raise ValueError("no samples: a median needs at least one")
    generator = random.Random(seed)
    medians = sorted(
        statistics.median(generator.choices(samples_s, k=len(samples_s))) for _ in range(num_resamples)
    )
    tail = (1 - confidence_fraction) / 2
    return MedianInterval(
        median_s=statistics.median(samples_s),
        low_s=medians[int(tail * (num_resamples - 1))],
        high_s=medians[-1 - int(tail * (num_resamples - 1))],
        confidence_fraction=confidence_fraction,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowestRank:
    """The time of one step over all ranks, and the rank that set it."""

    step_time_s: float
    rank: int


def slowest_ranks(times_by_rank_s: Sequence[Sequence[float]]) -> tuple[SlowestRank, ...]:
    """Per step the slowest rank; `times_by_rank_s[rank][step]`. Ties go to the lowest rank.

    Raises ValueError when ranks differ in their number of steps.
    """
    return tuple(
        SlowestRank(step_time_s=max(times), rank=times.index(max(times)))
        for times in zip(*times_by_rank_s, strict=True)
    )


def outliers(samples_s: Sequence[float]) -> tuple[bool, ...]:
    """Which samples lie further from the median than noise does; they are marked, never dropped.

    |x - median| > 5 x 1.4826 x MAD (Leys et al. 2013). Where more than half of the samples are equal (MAD 0)
    every other value is marked.
    """
    if not samples_s:
        return ()
    centre = statistics.median(samples_s)
    deviations = [abs(sample - centre) for sample in samples_s]
    limit = OUTLIER_DEVIATIONS * _NORMAL_CONSISTENCY * statistics.median(deviations)
    return tuple(deviation > limit for deviation in deviations)
