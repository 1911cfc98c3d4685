"""The toy of every recipe is legal under both layouts of a proof, and says in what it is not the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.spec.catalogue import find_recipe, recipe_paths, recipes_root
from moe_bench.spec.derive_verify import LAYOUTS, verify_recipe, verify_substitutions
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root())
HOST = LOADER.system("cpu_host")
PATHS = recipe_paths(LOADER.root)


@pytest.mark.parametrize("path", PATHS, ids=[f"{path.parent.name}/{path.stem}" for path in PATHS])
def test_the_toy_of_a_recipe_is_legal_and_states_its_substitutions(path: Path) -> None:
    asked = LOADER.recipe(path)
    for layout in LAYOUTS:
        toy = verify_recipe(asked, host=HOST, layout=layout)
        assert list(legality_problems(toy)) == []
        assert {"model.num_layers", "system"} <= {row.field for row in verify_substitutions(asked, toy)}


def test_the_toy_keeps_the_structure_of_the_model() -> None:
    asked = LOADER.recipe(find_recipe("deepseek_v3", LOADER))
    toy = verify_recipe(asked, host=HOST, layout="TP2 x EP2")
    assert toy.model.moe is not None
    assert toy.model.attention.kind == "mla"
    assert (toy.model.num_layers, toy.model.num_dense_layers, toy.num_mtp_layers) == (3, 1, 1)
    assert (toy.model.moe.top_k, toy.model.moe.router.groups_per_token) == (4, 2)
    assert toy.model.rope == asked.model.rope
    assert (toy.parallel.tensor, toy.parallel.expert, toy.parallel.num_gpus) == (2, 2, 2)
