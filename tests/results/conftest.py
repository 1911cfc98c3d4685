"""The registry and the architectures that its checks need, read once."""

from pathlib import Path

import pytest

from moe_bench.results.published import PublishedRow, load_rows
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published"


@pytest.fixture(scope="session")
def rows() -> dict[str, PublishedRow]:
    return {row.id: row for row in load_rows(PUBLISHED)}


@pytest.fixture(scope="session")
def templates() -> dict[str, Recipe]:
    loader = Loader(root=recipes_root())
    keys = sorted(path.parent.name for path in loader.root.glob("*/model.yaml"))
    return {key: loader.recipe(find_recipe(key, loader)) for key in keys}
