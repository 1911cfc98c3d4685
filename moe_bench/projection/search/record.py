"""Where a layout goes beyond what anybody published: the projection extrapolates there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from moe_bench.projection.rows.engines import is_scored
from moe_bench.projection.rows.folds import model_family
from moe_bench.results.published import PublishedRow
from moe_bench.spec.recipe import Recipe

_SIZES: tuple[tuple[str, Callable[[PublishedRow], int | None], Callable[[Recipe], int]], ...] = (
    ("TP", lambda row: row.tp, lambda recipe: recipe.parallel.tensor),
    ("PP", lambda row: row.pp, lambda recipe: recipe.parallel.pipeline),
    ("VPP", lambda row: row.vpp, lambda recipe: recipe.parallel.virtual_pipeline),
    ("CP", lambda row: row.cp, lambda recipe: recipe.parallel.context),
    ("EP", lambda row: row.ep, lambda recipe: recipe.parallel.expert),
    ("MBS", lambda row: row.mbs, lambda recipe: recipe.micro_batch_size),
)


@dataclass(frozen=True, slots=True)
class Record:
    """The largest sizes that scored rows print, of one family of models and of all."""

    num_rows: int
    """Of the family."""
    of_model: dict[str, int]
    of_any: dict[str, int]

    def beyond(self, recipe: Recipe) -> tuple[str, ...]:
        """Sizes of `recipe` above all of its family's rows, each with what those and any model's reach."""
        if not self.num_rows:
            return ("no published row of this model",)
        return tuple(
            f"{name}{own} (published rows of this model: at most {name}{self.of_model[name]}, "
            f"of any: {name}{self.of_any[name]})"
            for name, _, size in _SIZES
            if (own := size(recipe)) > self.of_model[name]
        )


def record_of(recipe: Recipe, rows: Sequence[PublishedRow]) -> Record:
    """What the rows of a registry say of the model of `recipe`; a size that no row prints is 1."""
    scored = [row for row in rows if is_scored(row)]
    family = model_family(recipe.model.key)
    own = [row for row in scored if model_family(row.model) == family]
    return Record(num_rows=len(own), of_model=_largest(own), of_any=_largest(scored))


def _largest(rows: Sequence[PublishedRow]) -> dict[str, int]:
    return {name: max((printed(row) or 1 for row in rows), default=1) for name, printed, _ in _SIZES}
