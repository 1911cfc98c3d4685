"""What half layers, Mamba-2 and gated delta nets keep, beside hand counts and what must hold."""

from __future__ import annotations

import pytest

from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.hybrid_memory import delta_net_elements, kept_by_structures, mamba_elements
from moe_bench.analysis.memory import pipeline_memory
from moe_bench.spec.load import Loader
from moe_bench.spec.mixer import GroupedQueryAttention
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import Recipe
from tests.analysis.conftest import RecipeMaker

TOKENS = 4096


@pytest.fixture(scope="module")
def nano(loader: Loader, make_recipe: RecipeMaker) -> Recipe:
    return make_recipe(loader.model("nemotron_3_nano_30b_a3b"), ParallelSpec(num_gpus=8, expert=8))


def kept(recipe: Recipe, *, is_moe: bool) -> dict[str, int]:
    return dict(ModelMemory(recipe).layer(is_moe=is_moe, is_recomputed=False).kept)


def test_a_mamba_layer_keeps_what_its_kernel_saves(nano: Recipe) -> None:
    mamba = nano.model.mamba
    assert mamba is not None
    # 64 heads of 64, 8 groups of 128 states: z, x, B, C, dt; then twice the output, and its norm
    assert mamba_elements(mamba) == (2 * 4096 + 2 * 8 * 128 + 64) + 3 * 4096


def test_a_delta_net_keeps_what_its_kernel_saves(loader: Loader) -> None:
    net = loader.model("qwen3_next_80b_a3b").gated_delta_net
    assert net is not None
    # 16 key and 32 value heads of 128: q k v z b a; z again; q, k normed, and repeated; v; chunks; o, normed,
    # gated
    projected = 2 * 2048 + 2 * 4096 + 2 * 32
    output = 3 * 4096
    assert delta_net_elements(net) == projected + 4096 + 2 * 2048 + 2 * 4096 + 4096 + 32 * 64 + output


def test_half_layers_keep_their_half(nano: Recipe) -> None:
    experts, mixers = kept(nano, is_moe=True), kept(nano, is_moe=False)
    assert "queries" not in experts
    assert "attention_norm" not in experts
    assert experts["layer_input"] == mixers["layer_input"] == TOKENS * 2688 * 2
    assert "mlp_input" not in experts
    assert experts["expert_input"] == TOKENS * 6 * 2688 * 2


def test_mixers_count_by_their_share(nano: Recipe) -> None:
    pattern, mamba = nano.model.hybrid_pattern, nano.model.mamba
    assert pattern is not None
    assert mamba is not None
    mixers = pattern.count("M") + pattern.count("*")
    found = kept(nano, is_moe=False)
    whole = TOKENS * 2 * mamba_elements(mamba)
    assert found["mamba"] == pytest.approx(whole * pattern.count("M") / mixers, abs=1)
    assert found["queries"] == pytest.approx(TOKENS * 2 * 32 * 128 * pattern.count("*") / mixers, abs=1)


def test_plain_layers_are_left_as_they_are(loader: Loader, make_recipe: RecipeMaker) -> None:
    recipe = make_recipe(loader.model("qwen3_30b_a3b"), ParallelSpec(num_gpus=8, expert=8))
    assert kept_by_structures(recipe, {"layer_input": 3, "queries": 5}, is_moe=True) == {
        "layer_input": 3,
        "queries": 5,
    }


@pytest.mark.parametrize("key", ["nemotron_3_nano_30b_a3b", "qwen3_next_80b_a3b", "nemotron_h_56b"])
def test_more_tensor_ranks_hold_less_of_every_hybrid(
    loader: Loader, make_recipe: RecipeMaker, key: str
) -> None:
    model = loader.model(key)
    expert = 8 if model.moe is not None else 1
    held = [
        pipeline_memory(make_recipe(model, ParallelSpec(num_gpus=64, tensor=tensor, expert=expert)))[
            0
        ].activations_bytes
        for tensor in (1, 2, 4)
    ]
    assert held[0] > held[1] > held[2]


def test_a_gated_output_is_kept_before_and_after_its_gate(loader: Loader, make_recipe: RecipeMaker) -> None:
    model = loader.model("qwen3_8b")
    assert isinstance(model.attention, GroupedQueryAttention)
    gated = model.model_copy(update={"attention": model.attention.model_copy(update={"output_gate": True})})
    plain, found = (kept(make_recipe(one, ParallelSpec(num_gpus=8)), is_moe=False) for one in (model, gated))
    more = {name: size - plain.get(name, 0) for name, size in found.items() if size != plain.get(name)}
    # 32 heads of 128: the gate in the product and its copy, and the output that the projection reads
    heads = TOKENS * 2 * 32 * 128
    assert more == {"qkv": heads, "gate": heads, "output_for_projection": heads}
