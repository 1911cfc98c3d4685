"""Names of recipes can be copied from the list, whatever the width of the terminal."""

from moe_bench.report.recipe_list import HEADINGS, recipe_list
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root(), rules=())
RECIPES = [LOADER.recipe(path) for path in recipe_paths(LOADER.root)]
MARKS = ["partly"] * len(RECIPES)
NAMES = [recipe.name for recipe in RECIPES]


def test_without_a_limit_every_column_is_there_in_one_line_per_recipe() -> None:
    heading, *lines = recipe_list(RECIPES, MARKS, width=None).splitlines()
    assert tuple(heading.split()) == HEADINGS
    assert [line.split()[0] for line in lines] == NAMES
    for recipe, line in zip(RECIPES, lines, strict=True):
        assert line.endswith(recipe.reproduces or "partly")
        assert f" {recipe.global_batch_size} " in line


def test_what_does_not_fit_a_terminal_is_left_out_and_named() -> None:
    for width in (60, 80, 100, 120, 160):
        heading, *lines, last = recipe_list(RECIPES, MARKS, width=width).splitlines()
        shown = heading.split()
        assert tuple(shown) == HEADINGS[: len(shown)]
        assert max(len(line) for line in (heading, *lines)) <= width
        assert [line.split()[0] for line in lines] == NAMES
        assert f"not shown in {width} columns: {', '.join(HEADINGS[len(shown) :])};" in last


def test_the_name_is_whole_where_even_that_does_not_fit() -> None:
    _, *lines, _ = recipe_list(RECIPES, MARKS, width=20).splitlines()
    assert lines == NAMES
