"""Which recipes get a card: those that ran or that the reader names, else every model's default run."""

from __future__ import annotations

from collections.abc import Sequence

from moe_bench.spec.catalogue import find_recipe, recipe_model_keys, recipe_paths
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import Plan


def page_recipes(loader: Loader, names: Sequence[str], plans: Sequence[Plan]) -> tuple[Recipe, ...]:
    """Recipes at full size, each once: first those of the `plans` that ran, then `names`.

    A run of a recipe that is not in the catalogue has a card only where it ran at full scale, for the record
    of a smaller one does not hold the recipe that was asked. Raises UnknownNameError for a name that stands
    for nothing.
    """
    catalogue = {f"{path.parent.name}/{path.stem}": path for path in recipe_paths(loader.root)}
    found: dict[str, Recipe] = {}
    for plan in plans:
        asked = plan.asked
        if asked in found:
            continue
        if asked in catalogue:
            found[asked] = loader.recipe(catalogue[asked])
        elif plan.scale == "full":
            found[asked] = plan.recipe
    for name in names:
        recipe = loader.recipe(find_recipe(name, loader))
        found[recipe.name] = recipe
    if not found:
        models = recipe_model_keys(loader.root)
        return tuple(loader.recipe(find_recipe(model, loader)) for model in models)
    return tuple(found.values())
