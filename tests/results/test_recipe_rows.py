"""Recipes that name a published row are that row, or say field by field where and why they are not."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from moe_bench.analysis.memory import memory_fit, pipeline_memory
from moe_bench.analysis.memory_verdict import MemoryVerdict, verdict
from moe_bench.results.published import PublishedRow, load_rows
from moe_bench.results.row_recipe import disagreements, drift_problems
from moe_bench.spec.catalogue import recipe_paths
from moe_bench.spec.load import Loader
from moe_bench.spec.pipeline import pipeline_chunks
from moe_bench.spec.recipe import Difference, Recipe

REPOSITORY = Path(__file__).resolve().parents[2]
LOADER = Loader(root=REPOSITORY / "recipes")
ROWS = {row.id: row for row in load_rows(REPOSITORY / "results" / "published")}
RECIPES = {f"{path.parent.name}/{path.stem}": path for path in recipe_paths(LOADER.root)}
MEGATRON_DEFAULT = "deepseek_v3/h100_sxm_1024g_bf16"
CARRIED_OVER_DEFAULT = "deepseek_v3/h100_sxm_256g_bf16"


@cache
def load(name: str) -> Recipe:
    return LOADER.recipe(RECIPES[name])


def row_of(recipe: Recipe) -> PublishedRow:
    assert recipe.reproduces is not None
    return ROWS[recipe.reproduces]


REPRODUCING = sorted(name for name in RECIPES if load(name).reproduces is not None)
OWN = sorted(name for name in RECIPES if load(name).reproduces is None)


@pytest.mark.parametrize("name", REPRODUCING)
def test_a_recipe_agrees_with_its_row_or_states_the_difference(name: str) -> None:
    recipe = load(name)
    assert drift_problems(row_of(recipe), recipe) == ()


@pytest.mark.parametrize("name", REPRODUCING)
def test_a_row_that_is_reproduced_trained_a_whole_model(name: str) -> None:
    assert row_of(load(name)).is_training


@pytest.mark.parametrize("name", OWN)
def test_a_recipe_without_a_row_says_what_its_layout_comes_from(name: str) -> None:
    head = RECIPES[name].read_text().partition("model:")[0].replace("\n# ", " ")
    assert load(name).differences == ()
    assert any(
        words in head for words in ("Nobody published", "no row to reproduce", "Published rows of this")
    )


def test_at_least_twenty_h100_rows_have_a_recipe_each() -> None:
    rows = [row_of(load(name)) for name in REPRODUCING]
    assert len({row.id for row in rows}) == len(rows)
    assert sum(row.hardware == "H100" for row in rows) >= 20


def test_most_recipes_copy_rows_that_megatron_itself_ran() -> None:
    carried_over = [
        name for name in REPRODUCING if any(d.field == "framework" for d in load(name).differences)
    ]
    assert len(carried_over) < len(REPRODUCING) / 4


@pytest.mark.parametrize("path", sorted(LOADER.root.glob("*/model.yaml")), ids=lambda path: path.parent.name)
def test_the_default_run_of_a_model_is_an_h100_run_in_bf16(path: Path) -> None:
    default = load(f"{path.parent.name}/{LOADER.model(path.parent.name).default_run}")
    assert (default.system.key, default.precision) == ("h100_sxm", "bf16")


def test_the_default_of_deepseek_v3_puts_61_layers_on_32_stages_of_four_ranks() -> None:
    recipe = load(CARRIED_OVER_DEFAULT)
    chunks = pipeline_chunks(recipe.parallel, num_layers=61, num_mtp_layers=0)
    per_rank = [sum(len(c.layers) for c in chunks if c.pipeline_rank == rank) for rank in range(4)]
    assert per_rank == [15, 16, 16, 14]  # Et| + 30 x tt| + L: ranks 0..3 take every fourth stage
    assert recipe.reproduces == "automodel-deepseek-v3-h100-256gpu-bf16-s4096"


def test_a_16_layer_stage_of_the_default_of_deepseek_v3_holds_46_gib_of_states() -> None:
    """BF16 weights and gradients, FP32 main weights and BF16 moments of four experts in each of 16 layers."""
    stage = pipeline_memory(load(CARRIED_OVER_DEFAULT))[2]  # the rank whose 16 layers all have experts
    assert stage.states_bytes / 2**30 == pytest.approx(46, abs=1)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_fits_its_gpu(name: str) -> None:
    """With one CUDA graph per iteration the upper bound is too wide to say so, of rows that ran."""
    recipe = load(name)
    has_one_graph = recipe.cuda_graphs.implementation == "full_iteration"
    assert verdict(memory_fit(recipe)) is (MemoryVerdict.TOO_CLOSE if has_one_graph else MemoryVerdict.FITS)


def test_a_changed_recipe_no_longer_agrees_with_its_row() -> None:
    recipe = load(MEGATRON_DEFAULT)
    changed = recipe.model_copy(update={"global_batch_size": 8192})
    assert [str(one) for one in disagreements(row_of(recipe), changed)] == [
        "gbs: the row has 16384, the recipe 8192"
    ]
    assert [problem.path for problem in drift_problems(row_of(recipe), changed)] == [("differences",)]


def test_a_stated_difference_that_is_none_is_a_mistake() -> None:
    recipe = load(MEGATRON_DEFAULT)
    claim = Difference(field="gbs", row="16384", recipe="8192", why="it is not so")
    (problem,) = drift_problems(row_of(recipe), recipe.model_copy(update={"differences": (claim,)}))
    assert (problem.path, problem.fix) == (("differences", 0), "remove the entry")


def test_a_difference_with_the_wrong_values_is_a_mistake() -> None:
    recipe = load(CARRIED_OVER_DEFAULT)
    wrong = tuple(
        difference.model_copy(update={"row": "fsdp"}) if difference.field == "sharding" else difference
        for difference in recipe.differences
    )
    (problem,) = drift_problems(row_of(recipe), recipe.model_copy(update={"differences": wrong}))
    assert problem.fix == "write row: fsdp2 and recipe: zero1"
