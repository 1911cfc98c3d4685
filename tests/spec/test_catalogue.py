"""A name means one file; models without recipes are models, but no recipes."""

from pathlib import Path

import pytest

from moe_bench.errors import BadInputError, RecipeError
from moe_bench.results.published import load_rows, model_key
from moe_bench.spec.catalogue import (
    data_root,
    find_recipe,
    is_recipe_file,
    model_of_row,
    recipe_model_keys,
    recipe_name,
    recipe_paths,
    recipes_root,
    reference_model_keys,
)
from moe_bench.spec.legality.structure import built_structure
from moe_bench.spec.load import Loader, UnknownNameError

LOADER = Loader(root=recipes_root())
REFERENCE = reference_model_keys(LOADER.root)


def test_no_model_has_recipes_and_stands_among_the_reference_models() -> None:
    assert not set(REFERENCE) & set(recipe_model_keys(LOADER.root))


@pytest.mark.parametrize("key", REFERENCE)
def test_a_reference_model_is_named_after_its_file_and_has_no_default_run(key: str) -> None:
    model = LOADER.model(key)
    assert (model.key, model.default_run) == (key, None)
    assert model.sources


def test_a_recipe_is_found_by_its_name_again_wherever_its_file_lies(tmp_path: Path) -> None:
    inside = find_recipe("olmoe_1b_7b", LOADER)
    assert find_recipe(recipe_name(inside, LOADER), LOADER) == inside
    outside = tmp_path / "own.yaml"
    assert find_recipe(recipe_name(outside, LOADER), LOADER) == outside


def test_reference_models_are_not_counted_as_recipes() -> None:
    folders = {path.parent.name for path in recipe_paths(LOADER.root)}
    assert folders == set(recipe_model_keys(LOADER.root))
    assert not is_recipe_file(LOADER.root / "reference_models" / "llama3_8b.yaml")


def test_the_bare_name_of_a_reference_model_says_that_it_has_no_recipe() -> None:
    with pytest.raises(BadInputError, match="llama3_8b is a reference model"):
        find_recipe("llama3_8b", LOADER)


@pytest.mark.parametrize("name", ["deepseek_v3/model.yaml", "systems/h200.yaml"])
def test_a_file_of_facts_is_no_recipe(name: str) -> None:
    with pytest.raises(BadInputError, match="facts of a model or a system, no recipe"):
        find_recipe(str(LOADER.root / name), LOADER)


def test_a_model_with_recipes_must_say_which_is_its_default(root: Path) -> None:
    path = root / "tiny" / "model.yaml"
    path.write_text(path.read_text().replace("default_run: cpu_host_8g_bf16\n", ""))
    with pytest.raises(RecipeError, match="default_run: the model names none"):
        Loader(root=root).default_run("tiny")


@pytest.mark.parametrize(
    ("name", "key", "num_layers"),
    [
        ("Llama3.1-405B", "llama3_1_405b", 126),
        ("Llama 3.1 405B", "llama3_1_405b", 126),
        ("llama3_70b", "llama3_70b", 80),
        ("Llama3-8B-LoRA", "llama3_8b", 32),
        ("Grok-1-314B", "grok_1_314b", 64),
        ("Llama3.1-405B-proxy-21L", "llama3_1_405b", 21),
        ("DeepSeek-V3-16B (V2-Lite-like)", "deepseek_v3_16b", 27),
        ("Qwen3-30B-A3B", "qwen3_30b_a3b", 48),
    ],
)
def test_the_name_of_a_row_means_one_model(name: str, key: str, num_layers: int) -> None:
    model = model_of_row(name, LOADER)
    assert (model.key, model.num_layers) == (key, num_layers)


def test_the_layers_that_a_row_prints_outrank_those_of_its_name() -> None:
    assert model_of_row("Grok-1-proxy-16L", LOADER, num_layers=8).num_layers == 8


def test_a_model_cannot_be_cut_to_more_layers_than_it_has() -> None:
    with pytest.raises(BadInputError, match="llama3_8b has 32 layers, 33 are asked for"):
        model_of_row("Llama3-8B", LOADER, num_layers=33)


def test_a_name_that_several_models_begin_with_means_none() -> None:
    with pytest.raises(UnknownNameError):
        model_of_row("Llama3.1", LOADER)


def test_an_unknown_model_is_answered_with_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="llama3_8b"):
        model_of_row("Llama3-9B", LOADER)


def test_a_row_of_a_model_with_recipes_means_the_model_of_its_registry_file() -> None:
    with_recipes = set(recipe_model_keys(LOADER.root))
    rows = [
        row
        for row in load_rows(data_root() / "results" / "published")
        if model_key(row.model) in with_recipes
    ]
    assert rows
    assert {(row.model, model_of_row(row.model, LOADER).key) for row in rows} == {
        (row.model, model_key(row.model)) for row in rows
    }


def test_a_recipe_may_name_a_reference_model_that_the_harness_builds(root: Path) -> None:
    for key in ("llama3_8b", "nemotron_3_nano_30b_a3b"):
        (root / "reference_models").mkdir(exist_ok=True)
        source = LOADER.root / "reference_models" / f"{key}.yaml"
        (root / "reference_models" / f"{key}.yaml").write_text(source.read_text())
    path = root / "tiny" / "cpu_host_8g_bf16.yaml"
    for key, problems in (
        ("llama3_8b", []),
        ("nemotron_3_nano_30b_a3b", ["half layers, squared_relu activation, no rotary embedding"]),
    ):
        recipe = Loader(root=root, rules=()).recipe(path, changes=[f"model={key}", "parallel.expert=1"])
        found = [problem.problem.partition(":")[0] for problem in built_structure.problems(recipe)]
        assert found == problems
