"""A recipe whose model chunks stand where another pipeline schedule has them."""

from __future__ import annotations

from dataclasses import replace

from pydantic import PrivateAttr

from moe_bench.projection.schedule.choice import schedule_shape
from moe_bench.projection.schedule.shape import ScheduleKind
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe


class PlacedRecipe(Recipe):
    """The recipe with its chunks on other ranks, and all that follows: states, gradients, loss."""

    _ranks: tuple[int, ...] = PrivateAttr(default=())

    def chunks(self) -> tuple[Chunk, ...]:
        """Model chunks in the order in which a token passes them, each with the rank of the schedule."""
        chunks = zip(super().chunks(), self._ranks, strict=True)
        return tuple(replace(chunk, pipeline_rank=rank) for chunk, rank in chunks)


def placed(recipe: Recipe, kind: ScheduleKind) -> Recipe:
    """`recipe` as `kind` places its chunks: as a V, where the schedule has one.

    DualPipe keeps every weight twice, on ranks as many as stages; the V halves the ranks instead, so that
    each holds two chunks once, which a recipe with `virtual_pipeline: 2` does anyway
    (github.com/deepseek-ai/DualPipe, README). Raises ScheduleError where no such schedule exists.
    """
    shape = schedule_shape(recipe, kind)
    if not kind.has_v_placement:
        return recipe
    made = PlacedRecipe.model_construct(**dict(recipe))
    made._ranks = tuple(shape.rank_of(chunk) for chunk in range(shape.num_chunks))
    return made
