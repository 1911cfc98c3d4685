"""`check` reads recipes, files and folders, and tells every problem of all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.check import Checked, check_recipes, named_files, require_legal
from moe_bench.spec.load import Loader
from moe_bench.spec.scale import Plan, full_plan, smoke_plan
from tests.spec.conftest import RECIPE

IMPOSSIBLE = Path(__file__).parents[1] / "recipes_impossible"
SHIPPED = Loader(root=recipes_root())


def checked_as_written(paths: tuple[Path, ...], loader: Loader) -> Checked:
    return check_recipes(paths, derive=lambda path: full_plan(loader.recipe(path), modified=()))


def test_all_means_every_shipped_recipe_and_all_are_legal() -> None:
    paths = named_files((), SHIPPED, is_all=True)
    assert paths == recipe_paths(recipes_root())
    checked = checked_as_written(paths, SHIPPED)
    assert checked.mistakes == ()
    assert checked.summary == f"{len(paths)} recipes, all legal"


def test_a_name_a_file_and_a_folder_are_recipes_and_none_is_read_twice(
    loader: Loader, recipe_path: Path
) -> None:
    for name in (
        "tiny",
        "tiny/cpu_host_8g_bf16",
        str(recipe_path),
        str(recipe_path.parent),
        str(loader.root),
    ):
        assert named_files((name,), loader, is_all=False) == (recipe_path,)
    assert named_files((str(recipe_path), str(recipe_path.parent)), loader, is_all=False) == (recipe_path,)
    assert checked_as_written((recipe_path,), loader).summary == "1 recipe, legal"


def test_nothing_to_check_is_a_mistake(loader: Loader, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInputError, match="name some, a folder, or --all"):
        named_files((), loader, is_all=False)
    with pytest.raises(BadInputError, match="leave the names out"):
        named_files(("tiny",), loader, is_all=True)
    with pytest.raises(BadInputError, match="no recipe in it"):
        named_files((str(tmp_path / "empty"),), loader, is_all=False)


def test_problems_of_all_recipes_are_told_at_once(
    loader: Loader, recipe_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(recipe_path.parent)
    recipe_path.write_text(RECIPE.replace("expert: 4", "expert: 3").replace("seq_len: 4096", "seq_len: many"))
    second = recipe_path.with_name("cpu_host_8g_bf16_two.yaml")
    second.write_text(RECIPE.replace("expert: 4", "expert: 3") + "variant: two\n")
    third = recipe_path.with_name("cpu_host_8g_bf16_three.yaml")
    third.write_text(RECIPE + "variant: three\n")
    checked = checked_as_written(named_files((str(recipe_path.parent),), loader, is_all=False), loader)
    assert checked.summary == "3 problems in 2 of 3 recipes"
    assert [(mistake.file, mistake.line, mistake.key) for mistake in checked.mistakes] == [
        ("cpu_host_8g_bf16.yaml", 4, "seq_len"),
        ("cpu_host_8g_bf16_two.yaml", 10, "parallel.expert"),
        ("cpu_host_8g_bf16_two.yaml", 10, "parallel.expert"),
    ]
    assert checked.as_json()["num_refused"] == 2


def test_a_recipe_that_is_illegal_only_at_another_scale_is_refused_there(
    loader: Loader, recipe_path: Path
) -> None:
    def shrunk_too_far(path: Path) -> Plan:
        plan = smoke_plan(loader.recipe(path), host=loader.system("cpu_host"), modified=())
        parallel = plan.recipe.parallel.model_copy(update={"num_gpus": 3})
        recipe = plan.recipe.model_copy(update={"parallel": parallel})
        return require_legal(plan.model_copy(update={"recipe": recipe}), path, loader)

    checked = check_recipes((recipe_path,), derive=shrunk_too_far)
    assert checked.num_refused == 1
    assert {mistake.key for mistake in checked.mistakes} == {"parallel.num_gpus", "parallel.expert"}
    assert all(mistake.problem.startswith("at smoke scale ") for mistake in checked.mistakes)


def test_a_recipe_that_cannot_be_cut_to_a_scale_does_not_stop_the_others(recipe_path: Path) -> None:
    def cut(path: Path) -> Plan:
        raise BadInputError("tiny needs TP2 GPUs at least; use another --num-gpus")

    checked = check_recipes((recipe_path, recipe_path), derive=cut)
    assert checked.num_refused == 2
    assert (checked.mistakes[0].problem, checked.mistakes[0].fix) == (
        "tiny needs TP2 GPUs at least",
        "use another --num-gpus",
    )


GRIDS = {
    "deepseek_v3/h100_sxm_64g_bf16": "ETP1 x EP64 x PP8 = 512 GPUs, num_gpus = 64",
    "deepseek_v3/h100_sxm_64g_fp8_tensorwise": "ETP1 x EP64 x PP8 = 512 GPUs, num_gpus = 64",
    "deepseek_v3/gb300_nvl72_128g_bf16_vr200": "ETP1 x EP64 x PP4 = 256 GPUs, num_gpus = 128",
    "deepseek_v3/gb300_nvl72_128g_fp8_tensorwise_vr200": "ETP1 x EP64 x PP4 = 256 GPUs, num_gpus = 128",
    "deepseek_v3/gb300_nvl72_128g_mxfp8_vr200": "ETP1 x EP64 x PP4 = 256 GPUs, num_gpus = 128",
    "deepseek_v3/gb300_nvl72_128g_nvfp4_vr200": "ETP1 x EP64 x PP4 = 256 GPUs, num_gpus = 128",
    "qwen3_235b_a22b/gb200_nvl72_64g_fp8_tensorwise": "ETP1 x EP32 x PP8 = 256 GPUs, num_gpus = 64",
    "qwen3_235b_a22b/gb200_nvl72_64g_mxfp8": "ETP1 x EP32 x PP8 = 256 GPUs, num_gpus = 64",
    "qwen3_235b_a22b/gb200_nvl72_64g_nvfp4": "ETP1 x EP32 x PP8 = 256 GPUs, num_gpus = 64",
    "qwen3_235b_a22b/gb300_nvl72_64g_bf16": "ETP1 x EP32 x PP4 = 128 GPUs, num_gpus = 64",
    "qwen3_235b_a22b/gb300_nvl72_64g_fp8_tensorwise": "ETP1 x EP32 x PP4 = 128 GPUs, num_gpus = 64",
    "qwen3_235b_a22b/gb300_nvl72_64g_mxfp8": "ETP1 x EP32 x PP4 = 128 GPUs, num_gpus = 64",
    "qwen3_235b_a22b/gb300_nvl72_64g_nvfp4": "ETP1 x EP32 x PP4 = 128 GPUs, num_gpus = 64",
}
"""The 13 recipes of Megatron-Bridge at 067f987df03b that cannot start, and the product that says so."""


def test_there_are_thirteen_impossible_public_recipes() -> None:
    names = {path.relative_to(IMPOSSIBLE).with_suffix("").as_posix() for path in IMPOSSIBLE.rglob("*.yaml")}
    assert names == set(GRIDS)
    assert len(GRIDS) == 13


@pytest.mark.parametrize(("name", "grid"), GRIDS.items())
def test_an_impossible_public_recipe_is_refused_for_its_expert_grid_alone(name: str, grid: str) -> None:
    checked = checked_as_written((IMPOSSIBLE / f"{name}.yaml",), SHIPPED)
    (mistake,) = checked.mistakes
    assert mistake.key == "parallel.expert"
    assert mistake.problem.startswith(grid)
    assert "megatron/core/parallel_state.py:882" in mistake.problem
