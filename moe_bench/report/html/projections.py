"""What the page shows of recipes that nobody ran: projected throughput, scaling, waterfalls, pipelines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from moe_bench.errors import BadInputError
from moe_bench.projection.forecast import forecast
from moe_bench.projection.scaleout import MAX_GPUS, scale_out
from moe_bench.report.html.chart import Chart
from moe_bench.report.html.pipeline_picture import pipeline_picture
from moe_bench.report.html.waterfall_chart import waterfall_chart
from moe_bench.report.recipe_list import layout_label
from moe_bench.report.scaling import Kind, ScalingPoint, recipe_subject
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections:
    """Of several recipes, by recipe name."""

    points: tuple[ScalingPoint, ...]
    pipeline_pictures: Mapping[str, Chart]
    waterfalls: Mapping[str, Chart]
    refused: Mapping[str, str]
    """Why a recipe cannot be projected."""


def projections(recipes: Iterable[Recipe]) -> Projections:
    """Every recipe projected at its own size, and weakly scaled from there by doubling to MAX_GPUS."""
    points: list[ScalingPoint] = []
    pictures: dict[str, Chart] = {}
    waterfalls: dict[str, Chart] = {}
    refused: dict[str, str] = {}
    for index, recipe in enumerate(recipes):
        try:
            made = forecast(recipe)
        except BadInputError as error:
            refused[recipe.name] = str(error)
            continue
        points += projected_points(recipe)
        waterfalls[recipe.name] = waterfall_chart(f"waterfall-{index}", made)
        if made.projection.timeline is not None:
            pictures[recipe.name] = pipeline_picture(f"pipeline-{index}", made.projection.timeline)
    return Projections(
        points=tuple(points), pipeline_pictures=pictures, waterfalls=waterfalls, refused=refused
    )


def projected_points(recipe: Recipe) -> Iterator[ScalingPoint]:
    """The recipe at its own size and at every doubling, under weak scaling.

    Raises BadInputError where it cannot be projected.
    """
    for point in scale_out(recipe, doublings(recipe), strong=False).points:
        member = point.projection.recipe
        yield ScalingPoint(
            kind=Kind.PROJECTED,
            subject=recipe_subject(member),
            family=f"projection of {recipe.name}",
            label=member.name,
            num_gpus=point.num_gpus,
            global_batch_size=member.global_batch_size,
            layout=layout_label(member),
            tokens_per_s_per_gpu=point.projection.tokens_per_s_per_gpu,
        )


def doublings(recipe: Recipe) -> tuple[int, ...]:
    """The recipe's size times powers of two, up to MAX_GPUS; a weak family has them all."""
    own = recipe.parallel.num_gpus
    return tuple(own << power for power in range((max(own, MAX_GPUS) // own).bit_length()))
