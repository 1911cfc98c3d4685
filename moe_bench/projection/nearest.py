"""The published rows nearest to a recipe, each beside the projection of that very row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from moe_bench.projection.interval import Interval, interval
from moe_bench.projection.rows.engines import is_scored, traits_of
from moe_bench.projection.rows.folds import model_family
from moe_bench.projection.rows.inference import Catalogue, InferredRun, infer
from moe_bench.projection.rows.recompute import with_recompute
from moe_bench.projection.step import project
from moe_bench.results.published import PublishedRow, load_model_rows
from moe_bench.results.row_recipe import PRECISIONS, disagreements
from moe_bench.spec.recipe import Recipe

NUM_SHOWN, NUM_ENOUGH, NUM_OF_SYSTEM = 5, 3, 2
"""How many rows are shown; from how many of the recipe's model on no others are looked for; else how many of
those stand beside them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearRow:
    """One published row beside its own projection."""

    run: InferredRun
    projected_tokens_per_s_per_gpu: float
    """Of the row's configuration, not of the recipe's."""
    interval: Interval
    """Where the row's step time is expected, as wide as its inferred fields make it."""
    differences: tuple[str, ...]
    """Columns in which the recipe is not what the row was."""

    @property
    def p90_ratios(self) -> tuple[float, float]:
        """Ratios that nine in ten rows which print as much keep."""
        step_s = math.sqrt(self.interval.p90.low_s * self.interval.p90.high_s)
        return self.interval.p90.low_s / step_s, self.interval.p90.high_s / step_s

    @property
    def ratio(self) -> float:
        """Projected over published throughput: above 1 where the projection promises too much."""
        return self.projected_tokens_per_s_per_gpu / self.run.tokens_per_s_per_gpu


def nearest_rows(recipe: Recipe, folder: Path, catalogue: Catalogue) -> tuple[NearRow, ...]:
    """Rows in `folder` (`results/published`) of the recipe's model, nearest first.

    Where these are few, rows of other models on its system in its precision stand besides.
    The row that the recipe reproduces comes first of all, whatever its trust, and of rows that repeat a
    configuration only one is taken. Other rows that cannot be projected or are not scored are passed over.
    """
    family = model_family(recipe.model.key)
    keys = sorted(path.stem for path in folder.glob("*.yaml"))
    of_model = [key for key in keys if model_family(key) == family]
    rows = [row for key in of_model for row in load_model_rows(folder, key)]
    found = list(islice(_distinct(_runs(_sorted(rows, recipe), recipe, catalogue)), NUM_SHOWN))
    if len(found) < NUM_ENOUGH:
        others = [row for key in keys if key not in of_model for row in load_model_rows(folder, key)]
        on_system = [row for row in others if _is_like(row, recipe)]
        found += islice(_of_kind(_runs(_sorted(on_system, recipe), recipe, catalogue), recipe), NUM_OF_SYSTEM)
    return tuple(_projected(run, recipe) for run in found)


def _sorted(rows: Sequence[PublishedRow], recipe: Recipe) -> list[PublishedRow]:
    return sorted(rows, key=lambda row: _distance(row, recipe))


def _distance(row: PublishedRow, recipe: Recipe) -> tuple[bool, bool, bool, float, int, str]:
    """The row reproduced, then system, precision, nearest size, fewest differences."""
    num_gpus = row.num_gpus or 1
    return (
        row.id != recipe.reproduces,
        not _is_on_system(row, recipe),
        row.precision != PRECISIONS.get(recipe.precision),
        abs(math.log2(num_gpus / recipe.parallel.num_gpus)),
        len(disagreements(row, recipe)),
        row.id,
    )


def _is_on_system(row: PublishedRow, recipe: Recipe) -> bool:
    """Whether the system's key begins with the printed name of the GPU: `h100_sxm` is an `H100`."""
    name = (row.hardware or "unknown").lower().replace("-", "_")
    return recipe.system.key == name or recipe.system.key.startswith(f"{name}_")


def _runs(rows: Iterable[PublishedRow], recipe: Recipe, catalogue: Catalogue) -> Iterator[InferredRun]:
    for row in rows:
        if not is_scored(row) and row.id != recipe.reproduces:
            continue
        run = infer(row, catalogue)
        if isinstance(run, InferredRun):
            yield run


def _is_like(row: PublishedRow, recipe: Recipe) -> bool:
    return _is_on_system(row, recipe) and row.precision == PRECISIONS.get(recipe.precision)


def _distinct(runs: Iterable[InferredRun]) -> Iterator[InferredRun]:
    """The first run of each configuration."""
    seen: set[str] = set()
    for run in runs:
        if run.configuration not in seen:
            seen.add(run.configuration)
            yield run


def _of_kind(runs: Iterable[InferredRun], recipe: Recipe) -> Iterator[InferredRun]:
    """Runs of models that have experts where the recipe's has them; one of each model."""
    seen: set[str] = set()
    for run in runs:
        key = run.recipe.model.key
        if (run.recipe.model.moe is None) == (recipe.model.moe is None) and key not in seen:
            seen.add(key)
            yield run


def _projected(run: InferredRun, recipe: Recipe) -> NearRow:
    run = with_recompute(run)
    projection = project(run.recipe, traits=traits_of(run))
    inferred = [one.field for one in run.assumptions]
    return NearRow(
        run=run,
        projected_tokens_per_s_per_gpu=projection.tokens_per_s_per_gpu,
        interval=interval(run.recipe, projection.step_s, inferred_fields=inferred),
        differences=tuple(map(str, disagreements(run.row, recipe))),
    )
