"""Which published rows stand beside a projection."""

from __future__ import annotations

import pytest

from moe_bench.projection.nearest import NUM_SHOWN, nearest_rows
from moe_bench.projection.rows.engines import traits_of
from moe_bench.projection.step import project
from moe_bench.spec.catalogue import find_recipe, recipe_paths, recipes_root
from moe_bench.spec.load import Loader
from tests.projection.published_rows import CATALOGUE, REPOSITORY

LOADER = Loader(root=recipes_root(), rules=())
PUBLISHED = REPOSITORY / "results" / "published"
COPIES = [
    path
    for path in recipe_paths(recipes_root())
    if "\nreproduces: " in path.read_text() and path.parent.name in ("deepseek_v3", "gpt_oss_120b")
]


@pytest.mark.parametrize("path", COPIES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_row_that_a_recipe_copies_comes_first_where_it_can_be_projected(path: object) -> None:
    recipe = LOADER.recipe(path)
    near = nearest_rows(recipe, PUBLISHED, CATALOGUE)
    assert near[0].run.row.id == recipe.reproduces


def test_rows_of_the_model_on_the_system_come_before_others_and_no_configuration_twice() -> None:
    recipe = LOADER.recipe(find_recipe("deepseek_v3", LOADER))
    near = nearest_rows(recipe, PUBLISHED, CATALOGUE)
    assert len(near) == NUM_SHOWN
    assert {one.run.fold("model") for one in near} == {"deepseek_v3"}
    assert {one.run.row.hardware for one in near} == {"H100"}
    assert len({one.run.configuration for one in near}) == NUM_SHOWN


def test_a_model_that_nobody_published_has_others_on_its_system_and_precision_beside_it() -> None:
    recipe = LOADER.recipe(find_recipe("glm_4_5_air", LOADER))
    near = nearest_rows(recipe, PUBLISHED, CATALOGUE)
    assert near
    assert len({one.run.recipe.model.key for one in near}) == len(near)
    for one in near:
        assert (one.run.row.hardware, one.run.row.precision) == ("H100", "BF16")
        assert one.run.recipe.model.moe is not None


def test_the_ratio_is_that_of_the_rows_own_configuration() -> None:
    recipe = LOADER.recipe(find_recipe("deepseek_v3", LOADER))
    for one in nearest_rows(recipe, PUBLISHED, CATALOGUE):
        alone = project(one.run.recipe, traits=traits_of(one.run)).tokens_per_s_per_gpu
        assert one.ratio == pytest.approx(alone / one.run.tokens_per_s_per_gpu)
        assert one.run.recipe.parallel.num_gpus == one.run.row.num_gpus
