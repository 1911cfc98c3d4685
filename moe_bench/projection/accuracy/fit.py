"""Constants of the projection fitted to published throughput, robustly and near their starting values."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from moe_bench.projection.constants import FITTED, PRIOR_SPREAD, Constants
from moe_bench.projection.pricing import Floats
from moe_bench.projection.step_time import StepTable, step_times

Mask = npt.NDArray[np.bool_]

_ROW_LOG_ERROR = 0.1
"""Error of a row that is expected; far beyond it a row hardly counts (scipy's `cauchy` loss)."""
_LIMIT = 2.5
"""No constant moves further than this factor from its start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observations:
    """Published rows beside the priced steps that should reproduce them; columns over rows."""

    table: StepTable
    tokens_per_gpu: Floats
    """Tokens of one step over the number of GPUs."""
    tokens_per_s_per_gpu: Floats
    """Published."""
    weight: Floats
    """1 / sqrt(n) for a configuration that n rows repeat, 0 for rows that are scored and not fitted."""


def projected_tokens_per_s(observations: Observations, constants: Constants) -> Floats:
    """[row] projected tokens per second and GPU."""
    projected: Floats = observations.tokens_per_gpu / step_times(observations.table, constants).step_s
    return projected


def fitted(
    observations: Observations,
    *,
    keep: Mask,
    start: Constants,
    names: tuple[str, ...] = FITTED,
) -> Constants:
    """`start` with the constants `names` fitted to the rows of `keep`.

    The most probable constants: ln(projected / published) of every row, weighted by configuration, with the
    tails of a Cauchy distribution, and ln(constant / start) within `PRIOR_SPREAD`.
    """
    from scipy.optimize import least_squares

    origin = np.log(np.array(start.values(names)))
    target = observations.tokens_per_s_per_gpu[keep]
    weight = observations.weight[keep]
    pull = np.array([_ROW_LOG_ERROR / PRIOR_SPREAD[name] for name in names])

    def residuals(logarithms: Floats) -> Floats:
        constants = start.with_values(names, tuple(np.exp(logarithms)))
        projected = projected_tokens_per_s(observations, constants)[keep]
        return np.concatenate([weight * np.log(projected / target), pull * (logarithms - origin)])

    span = np.log(_LIMIT)
    solution = least_squares(
        residuals,
        origin,
        bounds=(origin - span, origin + span),
        loss="cauchy",
        f_scale=_ROW_LOG_ERROR,
        x_scale=0.1,
        max_nfev=40,
    )
    return start.with_values(names, tuple(float(value) for value in np.exp(solution.x)))


def left_out(
    observations: Observations,
    *,
    folds: npt.NDArray[np.str_],
    start: Constants,
    names: tuple[str, ...] = FITTED,
) -> tuple[Floats, dict[str, Constants]]:
    """[row] projections with constants fitted without the row's own fold, and those constants by fold."""
    projected = np.full(len(folds), np.nan)
    by_fold = {}
    for fold in sorted(set(folds)):
        out = folds == fold
        constants = fitted(observations, keep=~out & (observations.weight > 0), start=start, names=names)
        projected[out] = projected_tokens_per_s(observations, constants)[out]
        by_fold[str(fold)] = constants
    return projected, by_fold
