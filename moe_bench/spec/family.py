"""The scaling family of a recipe: the same layout on more or fewer GPUs, weak or strong, or why not."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from typing import Literal

from moe_bench.errors import Mistake, RecipeError
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.recipe import Origin, Recipe
from moe_bench.spec.scale import Plan, Substitution, full_plan
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


def scaled_plan(plan: Plan, num_gpus: int, *, strong: bool) -> Plan:
    """The plan of the member of that size; of a toy, the toy with more or fewer replicas.

    At full scale the member is a recipe of its own, with the user's changes in its name. A toy keeps the name
    of the recipe that it stands for, and its size is one of the substitutions. Raises RecipeError as
    `scaled_recipe` does.
    """
    if plan.scale == "full":
        member = scaled_recipe(plan.recipe, num_gpus, strong=strong, changes=plan.modified)
        return full_plan(member, modified=())
    member = scaled_recipe(plan.recipe, num_gpus, strong=strong)
    return plan.model_copy(
        update={"recipe": member, "substitutions": tuple(_substitutions(plan, member))},
    )


def _substitutions(plan: Plan, member: Recipe) -> Iterator[Substitution]:
    """The rows of `plan`, in which the two fields that a member changes say what the member has."""
    rows = {row.field: row for row in plan.substitutions}
    for field, toy, used in (
        ("parallel.num_gpus", plan.recipe.parallel.num_gpus, member.parallel.num_gpus),
        ("global_batch_size", plan.recipe.global_batch_size, member.global_batch_size),
    ):
        asked = rows[field].asked if field in rows else str(toy)
        row = Substitution(field=field, asked=asked, used=str(used), why="--num-gpus")
        rows[field] = row
    yield from (row for row in rows.values() if row.asked != row.used)


def origin_comment(member: Recipe) -> str:
    """What stands on top of the file of a member: where it comes from, and what is its own."""
    origin = member.origin
    if origin is None:
        return f"A copy of {member.name}, the member of its family that has its size."
    kept = "replica" if origin.scaling == "weak" else "step"
    changes = f" after {', '.join(origin.changes)}," if origin.changes else ""
    return (
        f"{origin.recipe}{changes} on {member.parallel.num_gpus} GPUs by {origin.scaling} scaling: "
        f"DP{member.parallel.data}; TP, PP, CP, EP and ETP stay, and so do the sequences of a {kept}. "
        "Written by `moe-bench submit --num-gpus`."
    )


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
    row = recipe.reproduces or (recipe.origin.row if recipe.origin is not None else None)
    made_by = (f"{scaling}_of_{recipe.parallel.num_gpus}g", *map(_slug, changes))
    return recipe.model_copy(
        update={
            "variant": "_".join(part for part in (recipe.variant, *made_by) if part),
            "reproduces": None,
            "differences": (),
            "origin": Origin(recipe=recipe.name, scaling=scaling, changes=changes, row=row),
            "parallel": parallel,
            "global_batch_size": recipe.global_batch_size if strong else weak_batch,
        }
    )


def _slug(change: str) -> str:
    """`parallel.expert=8` as part of a file name: `expert_8`."""
    key, _, value = change.partition("=")
    return re.sub(r"[^a-z0-9]+", "_", f"{key.rpartition('.')[2]}_{value}".lower()).strip("_")
