"""A recipe that was computed, as the file that people write: names for model and system, no defaults."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from moe_bench.errors import BadInputError
from moe_bench.spec.load import Loader, UnknownNameError
from moe_bench.spec.recipe import Recipe

LINE_WIDTH = 110


def recipe_text(recipe: Recipe, *, comment: str, loader: Loader) -> str:
    """The YAML file of `recipe` under `comment`; reading it gives an equal recipe.

    The architecture stands in the file itself where the catalogue of `loader` has no equal one.
    """
    tree = recipe.model_dump(mode="json", exclude={"model", "system"}, exclude_defaults=True)
    tree = {
        "model": recipe.model.key
        if _is_known_model(recipe, loader)
        else recipe.model.model_dump(mode="json", exclude_defaults=True),
        "system": recipe.system.key
        if _is_known_system(recipe, loader)
        else recipe.system.model_dump(mode="json", exclude_defaults=True),
        **tree,
    }
    lines = textwrap.wrap(comment, LINE_WIDTH - 2)
    return "".join(f"# {line}\n" for line in lines) + "".join(_block(tree))


def write_recipe(recipe: Recipe, folder: Path, *, comment: str, loader: Loader) -> Path:
    """Write the file `<folder>/<model>/<run>.yaml` and give its path; an equal file that is there stays.

    Raises BadInputError where another one is there: a recipe that jobs wait for is not changed under them.
    """
    path = recipe_path(recipe, folder)
    text = recipe_text(recipe, comment=comment, loader=loader)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        if loader.recipe(path) != recipe:
            raise BadInputError(
                f"{path} is there and is another recipe; move it away, or write elsewhere"
            ) from error
    return path


def _block(tree: Mapping[str, object]) -> Iterator[str]:
    """A line per key, and one per key of the mappings right below: what is deeper stands in one line."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield f"{key}:\n"
            for below, child in value.items():
                yield textwrap.indent(_entry(below, child), "  ")
        else:
            yield _entry(key, value)


def _entry(key: str, value: object) -> str:
    # None is the style in which PyYAML writes the innermost collections in one line
    style = None if isinstance(value, dict | list) and value else False
    return yaml.safe_dump(
        {key: value}, sort_keys=False, default_flow_style=style, allow_unicode=True, width=LINE_WIDTH
    )


def recipe_path(recipe: Recipe, folder: Path) -> Path:
    """Where `write_recipe` puts `recipe`."""
    return folder / recipe.model.key / f"{recipe.run_name}.yaml"


def _is_known_model(recipe: Recipe, loader: Loader) -> bool:
    try:
        return loader.model(recipe.model.key) == recipe.model
    except UnknownNameError:
        return False


def _is_known_system(recipe: Recipe, loader: Loader) -> bool:
    try:
        return loader.system(recipe.system.key) == recipe.system
    except UnknownNameError:
        return False
