"""What a user writes behind --load."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.work.load_choice import load_choice
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root(), rules=())
QWEN = LOADER.recipe(find_recipe("qwen3_30b_a3b", LOADER))  # 128 experts on 16 ranks


def ratio(choice: str | None) -> float:
    return load_choice(QWEN, choice).busiest_over_mean_ratio


def test_loads_rise_from_balanced_over_random_to_skewed() -> None:
    ratios = [
        ratio(choice) for choice in ("balanced", "random", "power_law:0.3", "power_law:0.6", "power_law:1")
    ]
    assert ratios[0] == 1
    assert ratios == sorted(set(ratios))


def test_a_power_law_of_zero_is_balanced() -> None:
    assert ratio("power_law:0") == pytest.approx(1)


def test_without_a_choice_the_recipe_decides() -> None:
    assert load_choice(QWEN, None).name == f"routing.mode {QWEN.routing.mode}"


def test_a_recorded_trace_counts_the_busiest_rank_of_each_layer(tmp_path: Path) -> None:
    even, skewed = [10] * 128, [10] * 120 + [30] * 8  # the last rank of 16 holds the last 8 experts
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([even, skewed]))
    busiest = 30 / (sum(skewed) / 128)
    assert ratio(str(path)) == pytest.approx((1 + busiest) / 2)


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ("heavy", "unknown; write balanced, random"),
        ("power_law:", "'' is no exponent"),
        ("power_law:-1", "'-1' is no exponent"),
        ("power_law:nan", "'nan' is no exponent"),
        ("missing.json", "No such file"),
    ],
)
def test_what_means_nothing_is_refused(choice: str, problem: str) -> None:
    with pytest.raises(BadInputError, match=problem):
        ratio(choice)


def test_a_file_that_is_no_trace_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text('{"layers": 3}')
    with pytest.raises(BadInputError, match="not a routing trace"):
        ratio(str(path))


def test_a_trace_of_another_model_is_refused_with_its_file_and_layer(tmp_path: Path) -> None:
    recipe = Loader(root=recipes_root()).recipe(find_recipe("qwen3_30b_a3b", Loader(root=recipes_root())))
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([[1] * 128, [1] * 64]), encoding="utf-8")
    with pytest.raises(BadInputError, match=r"trace\.json: layer 1 has 64 experts, qwen3_30b_a3b 128"):
        load_choice(recipe, str(path))
