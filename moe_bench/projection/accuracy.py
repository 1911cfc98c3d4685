"""The projection held against every published row: errors by row and group, beside a naive baseline's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_bench.analysis.flops import gflops_per_token
from moe_bench.projection.constants import FITTED, Constants
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.fit import Observations, fitted, left_out, projected_tokens_per_s
from moe_bench.projection.pricing import Floats
from moe_bench.projection.row_inference import InferredRun, configuration_key
from moe_bench.projection.step_time import step_table
from moe_bench.projection.step_work import step_work
from moe_bench.results.flops_convention import OUR_COUNTING


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """One published row and its projection."""

    run: InferredRun
    projected_tokens_per_s_per_gpu: float
    baseline_tokens_per_s_per_gpu: float
    """The naive predictor's: the mean TFLOPs of other rows of this GPU, precision and kind of model."""

    @property
    def step_time_error(self) -> float:
        """Projected step time over the published one, less one: positive where the projection is slow."""
        return self.run.tokens_per_s_per_gpu / self.projected_tokens_per_s_per_gpu - 1

    @property
    def baseline_error(self) -> float:
        """The same of the naive predictor."""
        return self.run.tokens_per_s_per_gpu / self.baseline_tokens_per_s_per_gpu - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSummary:
    """Errors of step time over a set of rows, as fractions."""

    num_rows: int
    mape_fraction: float
    """Mean absolute error."""
    median_fraction: float
    """Median absolute error."""
    bias_fraction: float
    """Mean error with its sign; positive where the projection is slow."""
    p90_fraction: float
    """90th percentile of the absolute error."""
    baseline_mape_fraction: float


def summary(results: Sequence[RowResult]) -> ErrorSummary:
    """Errors of `results`, of which there must be one at least."""
    errors = np.array([result.step_time_error for result in results])
    baseline = np.array([result.baseline_error for result in results])
    absolute = np.abs(errors)
    return ErrorSummary(
        num_rows=len(results),
        mape_fraction=float(absolute.mean()),
        median_fraction=float(np.median(absolute)),
        bias_fraction=float(errors.mean()),
        p90_fraction=float(np.quantile(absolute, 0.9)),
        baseline_mape_fraction=float(np.abs(baseline).mean()),
    )


def summaries_by(results: Sequence[RowResult], group: Callable[[RowResult], str]) -> dict[str, ErrorSummary]:
    """`summary` of each group, largest group first."""
    groups: dict[str, list[RowResult]] = {}
    for result in results:
        groups.setdefault(group(result), []).append(result)
    ordered = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return {name: summary(members) for name, members in ordered}


def observations(runs: Sequence[InferredRun], *, is_fitted: Callable[[InferredRun], bool]) -> Observations:
    """`runs` priced, each with its weight in a fit: 1 / sqrt(n) where n fitted rows repeat a configuration.

    Raises BadInputError where a run's GPU has no rates.
    """
    efficiencies: dict[str, Efficiency] = {}
    works = []
    for run in runs:
        system = run.recipe.system
        if system.key not in efficiencies:
            efficiencies[system.key] = Efficiency(system)
        works.append(step_work(run.recipe, efficiencies[system.key]))
    keys = [configuration_key(run.row) for run in runs]
    chosen = [is_fitted(run) for run in runs]
    repeats = Counter(key for key, keep in zip(keys, chosen, strict=True) if keep)
    weights = [repeats[key] ** -0.5 if keep else 0.0 for key, keep in zip(keys, chosen, strict=True)]
    return Observations(
        table=step_table(works),
        tokens_per_gpu=_column(run.recipe.tokens_per_step / run.recipe.parallel.num_gpus for run in runs),
        tokens_per_s_per_gpu=_column(run.tokens_per_s_per_gpu for run in runs),
        weight=np.array(weights),
    )


def score(
    runs: Sequence[InferredRun],
    observed: Observations,
    constants: Constants,
) -> tuple[RowResult, ...]:
    """Every run under given constants; the baseline of a row is taken over all others."""
    projected = projected_tokens_per_s(observed, constants)
    folds = np.array([run.row.id for run in runs])
    return _results(runs, projected, _baseline(runs, folds))


def cross_validated(
    runs: Sequence[InferredRun],
    observed: Observations,
    *,
    fold: Callable[[InferredRun], str],
    start: Constants,
    names: tuple[str, ...] = FITTED,
) -> tuple[tuple[RowResult, ...], dict[str, Constants]]:
    """Every run under constants fitted, and a baseline taken, without its fold; and the constants by fold."""
    folds = np.array([fold(run) for run in runs])
    projected, by_fold = left_out(observed, folds=folds, start=start, names=names)
    return _results(runs, projected, _baseline(runs, folds)), by_fold


def refitted(observed: Observations, *, start: Constants, names: tuple[str, ...] = FITTED) -> Constants:
    """Constants fitted to all rows that have a weight."""
    return fitted(observed, keep=observed.weight > 0, start=start, names=names)


def _results(runs: Sequence[InferredRun], projected: Floats, baseline: Floats) -> tuple[RowResult, ...]:
    return tuple(
        RowResult(
            run=run,
            projected_tokens_per_s_per_gpu=float(value),
            baseline_tokens_per_s_per_gpu=float(naive),
        )
        for run, value, naive in zip(runs, projected, baseline, strict=True)
    )


def _baseline(runs: Sequence[InferredRun], folds: np.ndarray[tuple[int, ...], np.dtype[np.str_]]) -> Floats:
    """Mean model FLOPs per second of the rows outside a row's fold that have its GPU, precision class and
    kind (dense or MoE); without any, of those with its precision class and kind, scaled by the GPUs' peaks.
    """
    flops_per_token = _column(
        1e9
        * gflops_per_token(
            run.recipe.model,
            seq_len=run.recipe.seq_len,
            num_mtp_layers=run.recipe.num_mtp_layers,
            counting=OUR_COUNTING,
        )
        for run in runs
    )
    achieved = _column(run.tokens_per_s_per_gpu for run in runs) * flops_per_token
    peaks = _column(_peak(run) for run in runs)
    classes = np.array([_class(run) for run in runs])
    gpus = np.array([run.recipe.system.key for run in runs])
    naive = np.empty(len(runs))
    for row in range(len(runs)):
        others = (folds != folds[row]) & (classes == classes[row])
        same_gpu = others & (gpus == gpus[row])
        if same_gpu.any():
            rate = achieved[same_gpu].mean()
        elif others.any():
            rate = (achieved[others] / peaks[others]).mean() * peaks[row]
        else:
            rate = (achieved / peaks).mean() * peaks[row]
        naive[row] = rate / flops_per_token[row]
    return naive


def _class(run: InferredRun) -> str:
    width = {"bf16": "16 bits", "nvfp4": "4 bits"}.get(run.recipe.precision, "8 bits")
    return f"{width}, {'dense' if run.recipe.model.moe is None else 'MoE'}"


def _peak(run: InferredRun) -> float:
    gpu = run.recipe.system.gpu
    if gpu is None:
        return 1.0
    if run.recipe.precision == "bf16":
        return gpu.bf16_flops_per_s
    if run.recipe.precision == "nvfp4":
        return gpu.fp4_flops_per_s or gpu.fp8_flops_per_s
    return gpu.fp8_flops_per_s


def _column(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
