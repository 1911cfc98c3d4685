"""Rules that cannot be: sizes that differ between the two sides."""

from __future__ import annotations

import pytest

from moe_bench.checkpoints.rule import Place, Stacked

LAYER = Place(megatron="decoder.layers.3.", huggingface="model.layers.3.")


def test_sources_behind_one_another_make_a_taller_tensor() -> None:
    rule = LAYER.rule("up", ("gate", "linear"), (5, 2), (5, 2), how=Stacked(), expert=1, num_experts=4)
    assert rule.shape == (10, 2)
    assert rule.global_shape == (4, 10, 2)
    assert rule.label == "decoder.layers.3.up[1]"
    assert [named.name for named in rule.huggingface] == ["model.layers.3.gate", "model.layers.3.linear"]


def test_a_rule_whose_sides_differ_in_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decoder\.layers\.3\.down"):
        LAYER.rule("down", "down", (5, 2), shape=(5, 3))
