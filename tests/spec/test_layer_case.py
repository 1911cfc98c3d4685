"""One MoE layer read off a recipe, folded onto one rank, and loaded unequally."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.derive_layer import layer_obstacle, layer_recipe
from moe_bench.spec.layer_case import (
    LayerCase,
    LayerRouting,
    layer_case_of,
    layer_differences,
    sweep_of,
    swiglu_case,
    traced_routing,
)
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

LOADER = Loader(root=recipes_root())
SIZES = {
    "num_tokens": 64,
    "hidden_size": 32,
    "expert_ffn_hidden_size": 16,
    "num_experts": 8,
    "top_k": 2,
}


def recipe(name: str) -> Recipe:
    return LOADER.recipe(find_recipe(name, LOADER))


def test_a_rank_routes_its_share_of_the_micro_batch() -> None:
    asked = recipe("deepseek_v3/h100_sxm_256g_bf16")
    cut = asked.model_copy(
        update={
            "micro_batch_size": 2,
            "seq_len": 4096,
            "parallel": asked.parallel.model_copy(update={"tensor": 2, "context": 4}),
        }
    )
    assert layer_case_of(cut).num_tokens == 2 * 4096 // (2 * 4)


def test_folding_keeps_the_rows_of_the_local_experts() -> None:
    case = layer_case_of(recipe("deepseek_v3/h100_sxm_256g_bf16"))
    folded = case.folded()
    assert (case.ep_size, case.num_local_experts) == (64, 4)
    assert (folded.ep_size, folded.moe.num_experts, folded.moe.top_k) == (1, 4, 2)
    # EP64 sends this rank 64 x 4096 x 8 / 64 rows
    assert folded.num_rows == case.num_rows == 4096 * 8
    assert folded.moe.router.num_groups is None
    assert folded.folded() == folded


def test_what_a_layer_alone_cannot_have_is_refused() -> None:
    asked = recipe("mixtral_8x22b/h100_sxm_128g_bf16_capacity")
    with pytest.raises(BadInputError, match="token_drop"):
        layer_case_of(asked)
    cut = asked.model_copy(
        update={"token_drop": None, "parallel": asked.parallel.model_copy(update={"expert_tensor": 2})}
    )
    with pytest.raises(BadInputError, match="expert_tensor"):
        layer_case_of(cut)
    dense = asked.model_copy(update={"model": asked.model.model_copy(update={"moe": None})})
    with pytest.raises(BadInputError, match="no expert layers"):
        layer_case_of(dense)
    pyramid = recipe("pr_moe_350m/h100_sxm_8g_bf16").model_copy(update={"token_drop": None})
    with pytest.raises(BadInputError, match=r"model\.moe\.steps"):
        layer_case_of(pyramid)
    even = pyramid.at(pyramid.model.layers[-1])
    with pytest.raises(BadInputError, match="adds its shared experts"):
        layer_case_of(even)


def test_a_recipe_says_what_its_layer_alone_lacks() -> None:
    said = " ".join(layer_differences(recipe("deepseek_v3/h100_sxm_256g_bf16")))
    assert "deepep needs other ranks" in said
    assert "nothing is computed twice" in said


def test_a_fused_expert_is_taken_apart_and_the_recipe_says_so() -> None:
    asked = recipe("deepseek_v3/gb300_nvl72_256g_mxfp8")
    assert asked.kernels.op_fuser
    assert layer_obstacle(layer_case_of(asked), asked.system) is None
    assert "kernels.op_fuser: fc1, activation and fc2 run one after another" in layer_differences(asked)


def test_experts_are_whole_on_every_rank() -> None:
    case = swiglu_case("s", **SIZES)
    with pytest.raises(ValidationError, match="does not divide"):
        LayerCase.model_validate(case.model_dump() | {"ep_size": 3})


def test_a_trace_gives_the_loads_of_its_most_unequal_layer(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text(json.dumps([[4, 4, 4, 4], [10, 2, 2, 2], [0, 0, 0, 0]]))
    routing = traced_routing(path, option="--routing", choices="a file")
    assert routing.shares == (10, 2, 2, 2)
    with pytest.raises(BadInputError, match="counts 4 experts"):
        swiglu_case("s", **SIZES).with_routing(routing)
    path.write_text("[[0, 0]]")
    with pytest.raises(BadInputError, match="counts no tokens"):
        traced_routing(path, option="--routing", choices="a file")


def test_a_sweep_goes_from_balance_to_ever_steeper_laws() -> None:
    kinds = [one.routing for one in sweep_of(swiglu_case("s", **SIZES))]
    assert kinds[0] == LayerRouting(kind="balanced")
    exponents = [one.exponent for one in kinds[1:]]
    assert exponents == sorted(exponents)
    assert len(set(exponents)) == len(exponents)


def test_the_recipe_around_a_layer_has_its_sizes_and_nothing_else_of_a_model() -> None:
    case = layer_case_of(recipe("gpt_oss_20b"))
    around = layer_recipe(case, LOADER.system("h100_sxm"))
    assert around.model.num_layers == 1
    assert around.model.is_moe_layer(0)
    assert around.model.linear_bias
    assert (around.parallel.expert, around.parallel.num_gpus) == (case.ep_size, case.ep_size)
    assert around.micro_batch_size * around.seq_len == case.num_tokens
