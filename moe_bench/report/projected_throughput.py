"""Projected tokens/s/GPU of many recipes, for the tables in which they stand beside other numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from moe_bench.errors import BadInputError
from moe_bench.projection.step import project
from moe_bench.spec.recipe import Recipe


def projected_throughput(recipes: Iterable[Recipe]) -> Mapping[str, float]:
    """By recipe name; a recipe without rates, such as one in FP32, has none."""
    found = {}
    for recipe in recipes:
        try:
            found[recipe.name] = project(recipe).tokens_per_s_per_gpu
        except BadInputError:
            continue  # `project` says why to whoever asks for this recipe
    return found
