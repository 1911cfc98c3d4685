"""The scaling family of a recipe: the same layout on more or fewer GPUs, weak or strong, or why not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Literal

from moe_bench.errors import Mistake, RecipeError
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.recipe import Origin, Recipe
from moe_bench.spec.yaml_tree import dotted


def scaled_recipe(recipe: Recipe, num_gpus: int, *, strong: bool, changes: tuple[str, ...] = ()) -> Recipe:
    """`recipe` on `num_gpus` GPUs; the recipe itself where that is its own size.

    Everything that one replica of the model is stays: TP, PP, virtual stages, CP, EP and ETP. Only replicas
    are added or removed, so that the data-parallel size grows with the GPUs. EP never grows: a larger expert
    group would have other messages and other GEMMs, which is a different experiment. Weak scaling keeps the
    sequences of every replica, GBS = GBS_0 DP / DP_0; strong scaling keeps GBS.

    `changes` are the user's `key=value` texts that `recipe` was derived with: they become part of the
    member's name and origin. Raises RecipeError with every rule that the member breaks, the change that each
    rule proposes, and the sizes of the family that are nearest.
    """
    if num_gpus == recipe.parallel.num_gpus and not changes:
        return recipe
    member = _member(recipe, num_gpus, strong=strong, changes=changes)
    problems = legality_problems(member)
    if problems:
        near = " and ".join(str(size) for size in nearest_sizes(recipe, num_gpus, strong=strong)) or "none"
        raise RecipeError(
            tuple(
                Mistake(
                    file=f"--num-gpus {num_gpus}",
                    line=1,
                    key=dotted(problem.path),
                    problem=problem.problem,
                    fix=f"{problem.fix}; nearest legal sizes: {near}",
                )
                for problem in problems
            )
        )
    return member


def nearest_sizes(recipe: Recipe, num_gpus: int, *, strong: bool) -> tuple[int, ...]:
    """The largest legal size below `num_gpus` and the smallest above it, where the family has such."""
    unit = _unit(recipe)
    below = range((num_gpus - 1) // unit * unit, 0, -unit)
    above = range(num_gpus // unit * unit + unit, _largest(recipe, num_gpus, strong=strong) + 1, unit)
    found = (_first_legal(recipe, sizes, strong=strong) for sizes in (below, above))
    return tuple(size for size in found if size is not None)


def _first_legal(recipe: Recipe, sizes: Iterable[int], *, strong: bool) -> int | None:
    for size in sizes:
        member = _member(recipe, size, strong=strong, changes=())
        # asked first because it is cheap: most sizes of a strong family fail it
        has_whole_batch = member.global_batch_size % (member.micro_batch_size * member.parallel.data) == 0
        if has_whole_batch and not legality_problems(member):
            return size
    return None


def _unit(recipe: Recipe) -> int:
    """GPUs of the smallest job that both process grids tile: lcm(TP PP CP, ETP EP PP)."""
    parallel = recipe.parallel
    return math.lcm(parallel.model_parallel, parallel.expert_tensor * parallel.expert * parallel.pipeline)


def _largest(recipe: Recipe, num_gpus: int, *, strong: bool) -> int:
    """A size above which no other is legal (strong), or nothing new can happen (weak)."""
    if strong:
        return recipe.global_batch_size // recipe.micro_batch_size * recipe.parallel.model_parallel
    # the micro batches stay, so what a size breaks repeats with the grids
    return num_gpus + math.lcm(_unit(recipe), recipe.parallel.num_gpus)


def _member(recipe: Recipe, num_gpus: int, *, strong: bool, changes: tuple[str, ...]) -> Recipe:
    scaling: Literal["weak", "strong"] = "strong" if strong else "weak"
    parallel = recipe.parallel.model_copy(update={"num_gpus": num_gpus})
    weak_batch = recipe.global_batch_size // recipe.parallel.data * parallel.data
    made_by = (f"{scaling}_of_{recipe.parallel.num_gpus}g", *map(_slug, changes))
    return recipe.model_copy(
        update={
            "variant": "_".join(part for part in (recipe.variant, *made_by) if part),
            "reproduces": None,
            "differences": (),
            "origin": Origin(recipe=recipe.name, scaling=scaling, changes=changes),
            "parallel": parallel,
            "global_batch_size": recipe.global_batch_size if strong else weak_batch,
        }
    )


def _slug(change: str) -> str:
    """`parallel.expert=8` as part of a file name: `expert_8`."""
    key, _, value = change.partition("=")
    return re.sub(r"[^a-z0-9]+", "_", f"{key.rpartition('.')[2]}_{value}".lower()).strip("_")
