"""The projection held against every published row: errors by row and group, beside a naive baseline's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_bench.analysis.flops import gflops_per_token
from moe_bench.errors import BadInputError
from moe_bench.projection.accuracy.fit import Observations, left_out, projected_tokens_per_s
from moe_bench.projection.constants import FITTED, PRIOR, Constants
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.interval import num_deciding
from moe_bench.projection.pricing import Floats
from moe_bench.projection.rows.engines import is_fitted, is_scored, traits_of
from moe_bench.projection.rows.folds import FoldBy
from moe_bench.projection.rows.inference import Catalogue, InferredRun, NotProjectable, infer
from moe_bench.projection.rows.recompute import with_recompute
from moe_bench.projection.step import with_schedules
from moe_bench.projection.step_work import StepWork, step_work
from moe_bench.results.flops_convention import OUR_COUNTING
from moe_bench.results.published import PublishedRow

SUSPECT_FRACTION = 0.4
"""A published number that the projection contradicts by more is looked at again."""


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

    @property
    def counts(self) -> bool:
        """Whether the row enters summaries; others are projected and listed."""
        return is_scored(self.run.row)

    @property
    def is_suspect(self) -> bool:
        """Whether the projection contradicts the published number so far that one of them is wrong."""
        return abs(self.step_time_error) > SUSPECT_FRACTION

    @property
    def has_natural_routing(self) -> bool:
        """Whether experts are loaded unevenly, by the router or by a bias, or limited by a capacity."""
        recipe = self.run.recipe
        is_uneven = recipe.routing.mode in ("natural", "biased")
        return recipe.model.moe is not None and (is_uneven or recipe.token_drop is not None)

    @property
    def num_inferred(self) -> int:
        """How many deciding fields of its recipe the row does not print."""
        return num_deciding(one.field for one in self.run.assumptions)

    def corrected_by(self, anchor: RowResult) -> RowResult:
        """The same with the projection times published over projected of `anchor`."""
        factor = anchor.run.tokens_per_s_per_gpu / anchor.projected_tokens_per_s_per_gpu
        return replace(self, projected_tokens_per_s_per_gpu=self.projected_tokens_per_s_per_gpu * factor)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Projectable:
    """Which rows of a registry can be projected, and what becomes of the others."""

    runs: tuple[InferredRun, ...]
    """Rows that count, and those that are projected for completeness: functional runs and trust C."""
    works: tuple[StepWork, ...]
    """Of each run, priced."""
    failed: tuple[NotProjectable, ...]
    """Rows that train a whole model and cannot be projected, with the reason."""
    num_others: int
    """Rows that train no whole model: fine-tuning, single layers, kernels."""


def projectable(rows: Iterable[PublishedRow], catalogue: Catalogue) -> Projectable:
    """`rows` as complete recipes, as far as they can be."""
    runs: list[InferredRun] = []
    works: list[StepWork] = []
    failed: list[NotProjectable] = []
    efficiencies: dict[str, Efficiency] = {}
    num_others = 0
    for row in rows:
        if not row.is_training:
            num_others += 1
            continue
        run = infer(row, catalogue)
        if isinstance(run, NotProjectable):
            failed.append(run)
            continue
        try:
            run = with_recompute(run)
            works.append(_priced(run, efficiencies))
        except BadInputError as error:
            failed.append(NotProjectable(row=row, reason=str(error)))
        else:
            runs.append(run)
    return Projectable(runs=tuple(runs), works=tuple(works), failed=tuple(failed), num_others=num_others)


def _priced(run: InferredRun, efficiencies: dict[str, Efficiency]) -> StepWork:
    system = run.recipe.system
    if system.key not in efficiencies:
        efficiencies[system.key] = Efficiency(system)
    return step_work(run.recipe, efficiencies[system.key], traits=traits_of(run))


def prints_layout(row: PublishedRow) -> bool:
    """Whether the row prints all that a projection cannot do without: GPUs, sizes and batch.

    The number of FSDP's shards stands for TP and PP where it is printed instead.
    """
    has_grid = None not in (row.tp, row.pp) or row.num_shards is not None
    is_sized = None not in (row.hardware, row.num_gpus, row.precision, row.seq_len)
    return has_grid and is_sized and (row.gbs is not None or row.local_batch is not None)


def observations(found: Projectable, *, start: Constants) -> Observations:
    """Runs with their pipelines simulated under `start`, each with its weight in a fit.

    It is 1 / sqrt(n) for one of n fitted rows that repeat a configuration, 0 for rows that are not fitted.
    """
    runs = found.runs
    repeats = Counter(run.configuration for run in runs if is_fitted(run))
    return Observations(
        table=with_schedules(found.works, start),
        tokens_per_gpu=_column(run.recipe.tokens_per_step / run.recipe.parallel.num_gpus for run in runs),
        tokens_per_s_per_gpu=_column(run.tokens_per_s_per_gpu for run in runs),
        weight=_column(repeats[run.configuration] ** -0.5 if is_fitted(run) else 0.0 for run in runs),
    )


def accuracy_of(found: Projectable, *, left_out: FoldBy | None) -> tuple[RowResult, ...]:
    """Every run under the shipped constants, or those fitted from `PRIOR` without the row's fold."""
    if not found.runs:
        return ()
    if left_out is None:
        return score(found.runs, observations(found, start=Constants()), Constants())
    observed = observations(found, start=PRIOR)
    results, _ = cross_validated(found.runs, observed, fold=lambda run: run.fold(left_out), start=PRIOR)
    return results


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
    """Mean model FLOPs per second of the rows that count, outside a row's fold, with its GPU, precision class
    and kind (dense or MoE); without any, of those with its precision class and kind, scaled by the peaks.
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
    counts = np.array([is_scored(run.row) for run in runs])
    gpus = np.array([run.recipe.system.key for run in runs])
    naive = np.empty(len(runs))
    for row in range(len(runs)):
        others = counts & (folds != folds[row]) & (classes == classes[row])
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
