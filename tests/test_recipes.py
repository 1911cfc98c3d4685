"""Every shipped recipe is read, checked and named after its content."""

from pathlib import Path

import pytest

from moe_bench.harness.mcore_config import megatron_arguments, override_problems
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root(), rules=(legality_problems, override_problems))
RECIPES = recipe_paths(LOADER.root)
MODELS = sorted(path.parent.name for path in LOADER.root.glob("*/model.yaml"))
SYSTEMS = sorted(path.stem for path in LOADER.root.glob("systems/*.yaml"))


def label(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", RECIPES, ids=label)
def test_a_recipe_is_legal_and_named_after_its_content(path: Path) -> None:
    recipe = LOADER.recipe(path)
    assert path.relative_to(LOADER.root).with_suffix("").as_posix() == recipe.name
    assert megatron_arguments(recipe).transformer["num_layers"] == recipe.model.num_layers


@pytest.mark.parametrize("key", MODELS)
def test_the_default_run_of_a_model_is_one_of_its_recipes(key: str) -> None:
    model = LOADER.model(key)
    assert model.key == key
    assert (LOADER.root / key / f"{model.default_run}.yaml").is_file()


@pytest.mark.parametrize("key", SYSTEMS)
def test_a_system_is_named_after_its_file_and_cites_its_sources(key: str) -> None:
    system = LOADER.system(key)
    assert system.key == key
    assert system.sources or system.gpu is None


def test_the_models_of_the_suite_are_all_here() -> None:
    assert set(MODELS) >= {
        "deepseek_v3", "deepseek_v2_lite", "moonlight_16b_a3b", "kimi_k2", "qwen3_30b_a3b", "qwen3_235b_a22b",
        "gpt_oss_20b", "gpt_oss_120b", "mixtral_8x7b", "mixtral_8x22b", "olmoe_1b_7b", "glm_4_5_air",
    }  # fmt: skip


def test_a_machine_without_a_gpu_has_no_peak() -> None:
    assert LOADER.system("cpu_host").gpu is None
