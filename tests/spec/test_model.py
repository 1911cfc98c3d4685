"""The structure of every layer: half layers, windows, chunks, linear attention, alternating experts."""

import pytest

from moe_bench.spec.catalogue import find_recipe, recipe_model_keys, recipes_root, reference_model_keys
from moe_bench.spec.load import Loader
from moe_bench.spec.model import LayerStructure
from moe_bench.spec.recipe import TokenDrop

LOADER = Loader(root=recipes_root())
KEYS = recipe_model_keys(LOADER.root) + reference_model_keys(LOADER.root)


@pytest.mark.parametrize("key", KEYS)
def test_a_model_states_the_parts_that_its_layers_are_made_of(key: str) -> None:
    model = LOADER.model(key)
    structures = model.layers + model.mtp_layers
    assert len(model.layers) == model.num_layers
    assert any(one.mixer == "mamba" for one in structures) == (model.mamba is not None)
    assert any(one.mixer == "gated_delta_net" for one in structures) == (model.gated_delta_net is not None)
    compressed = model.compressed_attention
    assert any(one.mixer == "compressed_attention" for one in structures) == (compressed is not None)
    assert compressed is None or len(compressed.compression_ratios) == model.num_layers
    assert any(one.ffn == "moe" for one in structures) == (model.moe is not None)
    assert any(one.ffn == "dense" for one in structures) == (model.dense_ffn_hidden_size is not None)
    assert (model.mtp_pattern is not None) == (model.hybrid_pattern is not None and model.num_mtp_layers > 0)
    if model.hybrid_pattern is not None:
        assert len(model.hybrid_pattern) == model.num_layers


@pytest.mark.parametrize("key", KEYS)
def test_dense_layers_and_expert_layers_are_the_layers_that_transform(key: str) -> None:
    model = LOADER.model(key)
    assert model.num_dense_layers == sum(layer.ffn == "dense" for layer in model.layers)
    experts = [model.is_moe_layer(index) for index in range(model.num_layers)]
    assert experts == [layer.ffn == "moe" for layer in model.layers]


def test_letters_of_a_hybrid_model_are_half_layers() -> None:
    nano = LOADER.model("nemotron_3_nano_30b_a3b")
    assert [(layer.mixer, layer.ffn) for layer in nano.layers[4:7]] == [
        ("mamba", None),
        ("attention", None),
        (None, "moe"),
    ]


def test_every_fourth_layer_of_qwen3_next_has_full_attention() -> None:
    layers = LOADER.model("qwen3_next_80b_a3b").layers
    assert [layer.mixer for layer in layers[:4]] == ["gated_delta_net"] * 3 + ["attention"]
    assert sum(layer.mixer == "attention" for layer in layers) == 12


def test_every_second_layer_of_maverick_has_experts_and_every_fourth_sees_the_whole_sequence() -> None:
    layers = LOADER.model("llama_4_maverick_17b_128e").layers
    assert [layer.ffn for layer in layers[:4]] == ["dense", "moe", "dense", "moe"]
    assert [layer.chunk_tokens for layer in layers[:5]] == [8192, 8192, 8192, None, 8192]


def test_windows_alternate_with_full_attention_and_prediction_has_none() -> None:
    gpt_oss = LOADER.model("gpt_oss_20b")
    assert [layer.window_tokens for layer in gpt_oss.layers[:4]] == [128, None, 128, None]
    assert [layer.window_tokens for layer in gpt_oss.mtp_layers] == [None]


def test_leading_layers_of_deepseek_are_dense() -> None:
    layers = LOADER.model("deepseek_v3").layers
    assert [layer.ffn for layer in layers] == ["dense"] * 3 + ["moe"] * 58


def test_a_prediction_module_repeats_the_last_layer_or_its_own_pattern() -> None:
    assert LOADER.model("deepseek_v3").mtp_layers == (LayerStructure(mixer="attention", ffn="moe"),)
    assert LOADER.model("nemotron_3_super_120b_a12b").mtp_layers == (
        LayerStructure(mixer="attention", ffn=None),
        LayerStructure(mixer=None, ffn="moe"),
    )


def test_a_shared_prediction_module_has_one_set_of_parameters_at_any_depth() -> None:
    super_ = LOADER.model("nemotron_3_super_120b_a12b")
    assert [super_.num_mtp_modules(depths) for depths in (0, 1, 2)] == [0, 1, 1]
    assert LOADER.model("deepseek_v3").num_mtp_modules(2) == 2


def test_a_shortened_hybrid_model_keeps_the_beginning_of_its_pattern() -> None:
    short = LOADER.model("nemotron_h_56b").shortened(10)
    assert (short.num_layers, short.hybrid_pattern) == (10, "M-M-M-M*-M")


def test_experts_of_a_latent_model_see_narrow_tokens() -> None:
    assert LOADER.model("nemotron_3_super_120b_a12b").expert_hidden_size == 1024
    assert LOADER.model("nemotron_3_nano_30b_a3b").expert_hidden_size == 2688


def test_layers_of_deepseek_v4_compress_by_turns_and_prediction_sees_its_window_alone() -> None:
    flash = LOADER.model("deepseek_v4_flash")
    assert [layer.compression_ratio for layer in flash.layers[:5]] == [0, 0, 4, 128, 4]
    assert [layer.compression_ratio for layer in flash.mtp_layers] == [0]


def test_layers_of_glm_choose_keys_for_themselves_and_three_behind() -> None:
    glm = LOADER.model("glm_5_2")
    assert [index for index, layer in enumerate(glm.layers[:12]) if layer.has_indexer] == [0, 1, 2, 6, 10]
    assert sum(layer.has_indexer for layer in glm.layers) == 21
    assert [layer.has_indexer for layer in glm.mtp_layers] == [True]


def test_routers_that_see_later_tokens_say_so() -> None:
    causal = {
        name: LOADER.recipe(find_recipe(name, LOADER)).routing_is_causal
        for name in ("olmoe_1b_7b", "olmoe_1b_7b_switch", "olmoe_1b_7b_sinkhorn", "olmoe_1b_7b_expert_choice")
    }
    assert list(causal.values()) == [True, True, False, False]
    by_score = LOADER.recipe(find_recipe("olmoe_1b_7b", LOADER)).model_copy(
        update={"token_drop": TokenDrop(capacity_factor=1.0, policy="probs")}
    )
    assert not by_score.routing_is_causal
    # first choices of later tokens come before second ones of earlier tokens
    first_come = by_score.model_copy(update={"token_drop": TokenDrop(capacity_factor=1.0, policy="position")})
    assert first_come.routing_is_causal
    moe = first_come.model.moe
    assert moe is not None
    gshard = moe.model_copy(update={"router": moe.router.model_copy(update={"choice": "gshard"})})
    model = first_come.model.model_copy(update={"moe": gshard})
    assert not first_come.model_copy(update={"model": model}).routing_is_causal


@pytest.mark.parametrize(
    ("factor", "minimum", "capacity"), [(1.0, 0, 13), (1.25, 0, 16), (0.5, 10, 10), (2.0, 10, 25)]
)
def test_a_capacity_is_a_share_rounded_up_or_the_minimum(factor: float, minimum: int, capacity: int) -> None:
    drop = TokenDrop(capacity_factor=factor, eval_capacity_factor=1.0, min_capacity=minimum)
    # 50 tokens with two choices of 8 experts: 12.5 for each
    assert drop.capacity(num_choices=100, num_experts=8) == capacity
    assert drop.capacity(num_choices=100, num_experts=8, is_training=False) == 13


def test_experts_change_on_the_way_up_and_a_layer_sees_its_own_alone() -> None:
    model = LOADER.model("olmoe_1b_7b_pr_moe")
    seen = [model.at(layer).moe for layer in model.layers]
    assert [moe.num_experts for moe in seen if moe is not None] == [12] * 12 + [24] * 4
    assert all(moe is not None and not moe.steps for moe in seen)
    assert model.moe is not None
    assert (model.moe.expert_counts, model.moe.common_num_experts) == ((12, 24), 12)
    plain = LOADER.model("olmoe_1b_7b")
    assert plain.at(plain.layer(0)) is plain
