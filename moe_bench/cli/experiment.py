"""From what was typed behind `submit` to the jobs of an experiment, each with its plan and command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.cli.options import ScaleOption, derived_plan, make_loader, run_arguments
from moe_bench.errors import BadInputError, RecipeError
from moe_bench.launch.variants import PlannedJob, Variant
from moe_bench.spec.catalogue import find_recipe
from moe_bench.spec.family import origin_comment, scaled_plan
from moe_bench.spec.write import recipe_path, write_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The jobs of an experiment, and the members of its family that cannot exist."""

    jobs: tuple[PlannedJob, ...]
    refused: tuple[RecipeError, ...]
    """One per size and combination of changes: the rules that it breaks, and the nearest legal sizes."""


def planned_jobs(
    name: str,
    variants: Sequence[Variant],
    *,
    scale: ScaleOption,
    strong: bool,
    changes: Sequence[str] | None,
    first_repeat: int,
    folder: Path,
) -> Planned:
    """A job for every one of `variants` of the recipe `name`; members of a family have files below `folder`.

    A combination of changes that is illegal stops the experiment. An illegal size of a family is among the
    refused ones, and the others remain. Raises RecipeError where none remains, and BadInputError for sizes
    that the scale does not take.
    """
    is_node = scale is ScaleOption.NODE
    sizes = {variant.num_gpus for variant in variants}
    if is_node and len(sizes) > 1:
        raise BadInputError("--scale node cuts a recipe to one node: give --num-gpus one number")
    if strong and (is_node or None in sizes):
        raise BadInputError("--strong says how --num-gpus scales a recipe or its toy; drop it")
    loader = make_loader()
    path = find_recipe(name, loader)
    jobs: list[PlannedJob] = []
    refused: dict[tuple[int | None, tuple[str, ...]], RecipeError] = {}
    for variant in variants:
        changed, num_gpus = [*(changes or ()), *variant.changes], variant.num_gpus
        plan = derived_plan(
            path, loader=loader, scale=scale, num_gpus=num_gpus if is_node else None, changes=changed
        )
        run_args = run_arguments(name, scale=scale, num_gpus=num_gpus, changes=changed, strong=strong)
        file = None
        if num_gpus is not None and not is_node:
            try:
                plan = scaled_plan(plan, num_gpus, strong=strong)
            except RecipeError as error:
                refused[num_gpus, variant.changes] = error
                continue
            if plan.scale == "full":
                file = recipe_path(plan.recipe, folder)
                run_args = run_arguments(str(file), scale=scale, num_gpus=None, changes=None)
        repeat = first_repeat + variant.repeat
        run_args += ("--repeat", str(repeat)) if repeat else ()
        jobs.append(PlannedJob(plan=plan, run_args=run_args, repeat=repeat, file=file))
    if not jobs:
        raise RecipeError(tuple(mistake for one in refused.values() for mistake in one.mistakes))
    return Planned(jobs=tuple(jobs), refused=tuple(refused.values()))


def write_recipe_files(planned: Planned, folder: Path) -> None:
    """Write the recipe files that the jobs read; those that are there already stay."""
    loader = make_loader()
    for job in planned.jobs:
        if job.file is not None:
            recipe = job.plan.recipe
            write_recipe(recipe, folder, comment=origin_comment(recipe), loader=loader)
