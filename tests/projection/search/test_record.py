"""The search says where its layouts leave what anybody published."""

from __future__ import annotations

from moe_bench.projection.search.record import record_of
from moe_bench.results.published import load_rows
from moe_bench.spec.catalogue import data_root, find_recipe, recipes_root
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root(), rules=())
DEEPSEEK = LOADER.recipe(find_recipe("deepseek_v3", LOADER))
ROWS = load_rows(data_root() / "results" / "published")


def test_a_published_layout_is_within_the_record() -> None:
    assert record_of(DEEPSEEK, ROWS).beyond(DEEPSEEK) == ()


def test_wider_expert_groups_than_any_row_prints_are_named_with_what_rows_have() -> None:
    parallel = DEEPSEEK.parallel.model_copy(update={"expert": 256, "pipeline": 1})
    wide = DEEPSEEK.model_copy(update={"parallel": parallel})
    (text,) = record_of(wide, ROWS).beyond(wide)
    assert text.startswith("EP256 (published rows of this model: at most EP64")


def test_a_model_without_rows_says_so() -> None:
    assert record_of(DEEPSEEK, []).beyond(DEEPSEEK) == ("no published row of this model",)
