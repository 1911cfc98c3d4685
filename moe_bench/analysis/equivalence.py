"""How much faster one set of runs is than another, with its interval, and what that lets anybody claim."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt
from scipy.special import stdtrit

CONFIDENCE_FRACTION = 0.95
BAND_FRACTION = 0.05
"""Two throughputs within 5 % of each other count as the same."""
MIN_STEPS = 10
"""Steps of a single run that a bootstrap of its median needs; with fewer its coverage is well below 95 %."""
MAX_RUNS = 1000
_NUM_RESAMPLES = 5000
_SEED = 0

RunTimes = Sequence[float]
"""Steady step times of one run, in seconds."""
Array = npt.NDArray[np.float64]


class Claim(StrEnum):
    """What an interval of a ratio of throughputs lets anybody claim."""

    SAME = "same"
    FASTER = "faster"
    SLOWER = "slower"
    INCONCLUSIVE = "inconclusive"


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioInterval:
    """A ratio of throughputs, new over old, and the 95 % interval in which it lies."""

    estimate_ratio: float
    low_ratio: float
    high_ratio: float
    basis: Literal["runs", "steps"]
    """`runs`: from the spread between runs. `steps`: from the spread of steps within single runs, which does
    not see what differs from one run to the next."""
    num_runs: int
    """Of the side under test."""
    log_std: float
    """Standard deviation of the logarithm of the ratio of one run; with basis `steps` at least that."""


def ratio_to_value(runs_s: Sequence[RunTimes], *, value_s: float) -> RatioInterval | None:
    """Throughput of `runs_s` over that of one step time `value_s`, taken as exact.

    With two runs or more: Student's t on the logarithms of the runs' medians, ln(value / median_i). With one:
    percentile bootstrap of the median over its steps (Efron 1979). None with one run of fewer than MIN_STEPS
    steps. Raises ValueError without runs.
    """
    logs = [math.log(value_s / statistics.median(times_s)) for times_s in _required(runs_s)]
    if len(logs) > 1:
        spread = statistics.stdev(logs)
        return _t_interval(statistics.mean(logs), spread, num_runs=len(logs), freedom=len(logs) - 1)
    if len(runs_s[0]) < MIN_STEPS:
        return None
    return _bootstrap_interval(
        (np.asarray(runs_s[0]),),
        lambda times_s, axis: np.log(value_s / np.median(times_s, axis=axis)),
        num_runs=1,
    )


def ratio_between(base_runs_s: Sequence[RunTimes], new_runs_s: Sequence[RunTimes]) -> RatioInterval | None:
    """Throughput of `new_runs_s` over that of `base_runs_s`, for equal tokens per step.

    The estimate is the ratio of the geometric means of the runs' medians. With two runs or more on both
    sides its interval is Welch's t on the logarithms of the medians. A single run is taken to scatter like
    the n runs of the other side: Student's t with their standard deviation s, half width t s sqrt(1 + 1 / n).
    With one run on each side it is the percentile bootstrap over the steps of both, each drawn from its own;
    None where one has fewer than MIN_STEPS. Raises ValueError where a side has no runs.
    """
    base = [math.log(statistics.median(times_s)) for times_s in _required(base_runs_s)]
    new = [math.log(statistics.median(times_s)) for times_s in _required(new_runs_s)]
    if min(len(base), len(new)) > 1:
        estimate = statistics.mean(base) - statistics.mean(new)
        spread = math.hypot(statistics.stdev(base), statistics.stdev(new))
        errors = statistics.variance(base) / len(base), statistics.variance(new) / len(new)
        error = math.sqrt(sum(errors))
        # Welch-Satterthwaite; without any spread every number of degrees gives the same interval
        parts = errors[0] ** 2 / (len(base) - 1) + errors[1] ** 2 / (len(new) - 1)
        freedom = sum(errors) ** 2 / parts if parts else len(base) + len(new) - 2
        return _interval(
            estimate, _t_quantile(freedom) * error, basis="runs", num_runs=len(new), log_std=spread
        )
    several = max(base, new, key=len)
    if len(several) > 1:
        spread = statistics.stdev(several)
        half = _t_quantile(len(several) - 1) * spread * math.sqrt(1 + 1 / len(several))
        estimate = statistics.mean(base) - statistics.mean(new)
        return _interval(estimate, half, basis="runs", num_runs=len(new), log_std=math.hypot(spread, spread))
    if any(len(times_s) < MIN_STEPS for times_s in (*base_runs_s, *new_runs_s)):
        return None
    return _bootstrap_interval(
        (np.asarray(base_runs_s[0]), np.asarray(new_runs_s[0])),
        lambda base_s, new_s, axis: np.log(np.median(base_s, axis=axis) / np.median(new_s, axis=axis)),
        num_runs=1,
    )


def claim(interval: RatioInterval | None, *, band_fraction: float = BAND_FRACTION) -> Claim:
    """The same if the whole interval lies within 1 - band to 1 + band; else faster or slower if it lies
    wholly on one side of 1; else nothing.

    The first is the equivalence test of Schuirmann 1987, two one-sided tests at 2.5 % each.
    """
    if interval is None:
        return Claim.INCONCLUSIVE
    if 1 - band_fraction <= interval.low_ratio and interval.high_ratio <= 1 + band_fraction:
        return Claim.SAME
    if interval.low_ratio > 1:
        return Claim.FASTER
    return Claim.SLOWER if interval.high_ratio < 1 else Claim.INCONCLUSIVE


def runs_to_decide(interval: RatioInterval | None, *, band_fraction: float = BAND_FRACTION) -> int:
    """The smallest number of runs, on each side, with which the same ratio and spread would make a claim.

    Half width of n runs: t_(0.975, n - 1) s / sqrt(n). With basis `steps` the spread between runs is unknown
    and that of the steps stands for it, so the answer is a lower bound; without an interval it is 2. Stops at
    MAX_RUNS.
    """
    if interval is None:
        return 2
    estimate = math.log(interval.estimate_ratio)
    for num_runs in range(2, MAX_RUNS):
        half = _t_quantile(num_runs - 1) * interval.log_std / math.sqrt(num_runs)
        wanted = _interval(estimate, half, basis="runs", num_runs=num_runs, log_std=interval.log_std)
        if claim(wanted, band_fraction=band_fraction) is not Claim.INCONCLUSIVE:
            return num_runs
    return MAX_RUNS


def _required(runs_s: Sequence[RunTimes]) -> Sequence[RunTimes]:
    if not runs_s or not all(runs_s):
        raise ValueError("a ratio needs at least one run of at least one step on each side")
    return runs_s


def _t_quantile(freedom: float) -> float:
    return float(stdtrit(freedom, (1 + CONFIDENCE_FRACTION) / 2))


def _t_interval(estimate: float, spread: float, *, num_runs: int, freedom: float) -> RatioInterval:
    half = _t_quantile(freedom) * spread / math.sqrt(num_runs)
    return _interval(estimate, half, basis="runs", num_runs=num_runs, log_std=spread)


def _bootstrap_interval(
    steps_s: tuple[Array, ...], log_ratio: Callable[..., Array], *, num_runs: int
) -> RatioInterval:
    """The percentile interval of `log_ratio`, which takes one array of steps per side and an axis."""
    from scipy import stats  # takes longer than all else here, and only single runs need it

    resampled = stats.bootstrap(
        steps_s,
        log_ratio,
        method="percentile",
        confidence_level=CONFIDENCE_FRACTION,
        n_resamples=_NUM_RESAMPLES,
        rng=_SEED,
    )
    low, high = resampled.confidence_interval
    return RatioInterval(
        estimate_ratio=math.exp(log_ratio(*steps_s, axis=-1)),
        low_ratio=math.exp(low),
        high_ratio=math.exp(high),
        basis="steps",
        num_runs=num_runs,
        log_std=float(resampled.standard_error),
    )


def _interval(
    estimate: float, half: float, *, basis: Literal["runs", "steps"], num_runs: int, log_std: float
) -> RatioInterval:
    return RatioInterval(
        estimate_ratio=math.exp(estimate),
        low_ratio=math.exp(estimate - half),
        high_ratio=math.exp(estimate + half),
        basis=basis,
        num_runs=num_runs,
        log_std=log_std,
    )
