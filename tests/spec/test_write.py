"""A recipe that is written as a file is read back equal, by the same rules as a file that people wrote."""

from pathlib import Path

import pytest
from rich.pretty import pretty_repr

from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.family import scaled_recipe
from moe_bench.spec.load import Loader
from moe_bench.spec.scale import smoke_plan
from moe_bench.spec.write import recipe_text, write_recipe

LOADER = Loader(root=recipes_root())
PATHS = recipe_paths(LOADER.root)


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_recipe_is_read_back_equal(path: Path, tmp_path: Path) -> None:
    recipe = LOADER.recipe(path)
    written = write_recipe(recipe, tmp_path, comment="a copy", loader=LOADER)
    assert LOADER.recipe(written) == recipe, pretty_repr(written.read_text())


def test_a_member_of_a_family_names_its_origin_and_folds_its_comment(tmp_path: Path) -> None:
    base = LOADER.recipe(LOADER.root / "deepseek_v3/h100_sxm_1024g_bf16.yaml")
    member = scaled_recipe(base, 512, strong=False)
    written = write_recipe(member, tmp_path, comment="words " * 60, loader=LOADER)
    assert written == tmp_path / "deepseek_v3/h100_sxm_512g_bf16_weak_of_1024g.yaml"
    text = written.read_text()
    assert "origin:\n  recipe: deepseek_v3/h100_sxm_1024g_bf16\n  scaling: weak\n  row: mbcard-" in text
    assert "model: deepseek_v3\nsystem: h100_sxm\n" in text
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert len(comment) == 4
    assert max(map(len, comment)) <= 110
    assert LOADER.recipe(written) == member


def test_an_architecture_that_the_catalogue_does_not_have_stands_in_the_file(tmp_path: Path) -> None:
    base = LOADER.recipe(LOADER.root / "qwen3_30b_a3b/h100_sxm_16g_bf16.yaml")
    toy = smoke_plan(base, host=LOADER.system("cpu_host"), modified=()).recipe
    text = recipe_text(toy, comment="a toy", loader=LOADER)
    assert "hidden_size: 64" in text
    assert "system: cpu_host\n" in text
    assert LOADER.recipe(write_recipe(toy, tmp_path, comment="a toy", loader=LOADER)) == toy


def test_a_file_with_another_recipe_is_not_overwritten(tmp_path: Path) -> None:
    base = LOADER.recipe(LOADER.root / "qwen3_30b_a3b/h100_sxm_16g_bf16.yaml")
    written = write_recipe(base, tmp_path, comment="first", loader=LOADER)
    text = written.read_text()
    assert write_recipe(base, tmp_path, comment="second", loader=LOADER) == written
    with pytest.raises(BadInputError, match="is another recipe"):
        write_recipe(base.model_copy(update={"seed": 1}), tmp_path, comment="third", loader=LOADER)
    assert written.read_text() == text
