"""Parameters by hand, by publication, and over every rank of every layout."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bench.analysis.params import (
    Part,
    Weights,
    attention_norm_params,
    embedding_params,
    gated_delta_net_params,
    grouped_query_attention_params,
    main_weights,
    mamba_params,
    mlp_params,
    mtp_projection_params,
    mtp_weights,
    multi_latent_attention_params,
    rank_params,
    rank_weights,
    router_params,
    structure_weights,
    sum_parts,
)
from moe_bench.spec.load import Loader
from moe_bench.spec.mixer import GatedDeltaNet, Mamba2
from moe_bench.spec.model import LayerStructure, ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import Recipe
from tests.analysis.conftest import RecipeMaker


def total_of(parts: dict[Part, Weights]) -> int:
    return sum(weights.total for weights in parts.values())


def whole(model: ModelSpec) -> int:
    return total_of(main_weights(model, num_experts=None, family=None))


def test_grouped_query_attention_matches_a_hand_count() -> None:
    # Qwen3-30B-A3B: q 2048 x 4096, k and v 2048 x 512 each, out 4096 x 2048
    counted = grouped_query_attention_params(
        hidden=2048, num_heads=32, num_query_groups=4, head_dim=128, qkv_bias=False, output_bias=False
    )
    assert counted == Weights(2048 * (4096 + 512 + 512) + 4096 * 2048)
    assert counted.total == 18_874_368


def test_biases_of_attention_are_counted_and_only_the_output_bias_is_repeated() -> None:
    with_biases = grouped_query_attention_params(
        hidden=2880, num_heads=64, num_query_groups=8, head_dim=64, qkv_bias=True, output_bias=True
    )
    without = grouped_query_attention_params(
        hidden=2880, num_heads=64, num_query_groups=8, head_dim=64, qkv_bias=False, output_bias=False
    )
    assert with_biases.sharded - without.sharded == 4096 + 512 + 512
    assert with_biases.replicated == 2880


def test_latent_attention_matches_a_hand_count() -> None:
    # DeepSeek-V3: 187,105,280 = 7168x1536 + 1536x24576 + 7168x576 + 512x32768 + 16384x7168
    counted = multi_latent_attention_params(
        hidden=7168, num_heads=128, q_rank=1536, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    )
    assert counted.total == 187_105_280
    assert counted.replicated == 7168 * 1536 + 7168 * 576


def test_latent_attention_without_query_compression_projects_queries_directly() -> None:
    counted = multi_latent_attention_params(
        hidden=2048, num_heads=16, q_rank=None, kv_rank=512, nope_dim=128, rope_dim=64, v_dim=128
    )
    assert counted.total == 2048 * 3072 + 2048 * 576 + 512 * 4096 + 2048 * 2048


def test_an_expert_matches_a_hand_count() -> None:
    assert mlp_params(hidden=7168, ffn=2048, bias=False, is_gated=True).total == 44_040_192
    # GPT-OSS: biases on both projections
    assert mlp_params(hidden=2880, ffn=2880, bias=True, is_gated=True) == Weights(
        3 * 2880 * 2880 + 5760, 2880
    )


def test_a_router_has_one_row_per_expert_and_no_expert_bias() -> None:
    assert router_params(hidden=7168, num_experts=256, bias=False) == Weights(0, 1_835_008)
    assert router_params(hidden=2880, num_experts=32, bias=True).total == 2880 * 32 + 32


def test_embeddings_and_mtp_projections_match_hand_counts() -> None:
    assert embedding_params(hidden=7168, vocab_size=129_280).total == 926_679_040
    assert mtp_projection_params(hidden=7168).total == 102_760_448


@pytest.mark.parametrize(
    ("key", "num_gains"),
    [
        ("deepseek_v3", 1536 + 512),
        ("moonlight_16b_a3b", 512),
        ("qwen3_30b_a3b", 2 * 128),
        ("olmoe_1b_7b", 2 * 16 * 128),
        ("mixtral_8x7b", 0),
    ],
)
def test_norms_inside_attention_match_their_kind(
    models: dict[str, ModelSpec], key: str, num_gains: int
) -> None:
    assert attention_norm_params(models[key].attention).total == num_gains


@pytest.mark.parametrize(
    ("key", "num_gains"),
    [
        ("deepseek_v2_lite", 27 * 2048),
        ("moonlight_16b_a3b", 27 * 2048),
        ("deepseek_v3", 0),
        ("mixtral_8x7b", 0),
    ],
)
def test_transformer_engine_norms_the_input_of_uncompressed_queries_once_more(
    models: dict[str, ModelSpec], key: str, num_gains: int
) -> None:
    native, fused = (
        total_of(main_weights(models[key], num_experts=1, family=family))
        for family in ("torch_native", "transformer_engine")
    )
    assert fused - native == num_gains


def test_sinks_are_one_parameter_per_head(models: dict[str, ModelSpec]) -> None:
    model = models["gpt_oss_20b"]
    layer = LayerStructure(mixer="attention", ffn="moe")
    attention = structure_weights(model, layer, num_experts=32, family=None)[Part.ATTENTION]
    projections = grouped_query_attention_params(
        hidden=2880, num_heads=64, num_query_groups=8, head_dim=64, qkv_bias=True, output_bias=True
    )
    assert attention.total - projections.total == 64


def test_an_mtp_module_matches_the_published_one(models: dict[str, ModelSpec]) -> None:
    # 11.61 B without the expert bias (256); the authors state 11.5 B besides embedding and head
    assert total_of(mtp_weights(models["deepseek_v3"], num_experts=256, family=None)) == (
        682_636_487_424 - 671_026_419_200 - 256
    )


def test_tied_embeddings_have_no_head_of_their_own(models: dict[str, ModelSpec]) -> None:
    model = models["olmoe_1b_7b"]
    tied = model.model_copy(update={"tied_embeddings": True})
    assert whole(model) - whole(tied) == model.vocab_size * model.hidden_size


def test_deepseek_stages_on_256_gpus_match_hand_counts(deepseek_256: Recipe) -> None:
    # rank 2: 16 expert layers with 4 local experts each
    rank = rank_params(deepseek_256, 2)
    assert rank.expert == 16 * 4 * 44_040_192
    assert rank.dense == 16 * (187_105_280 + 2048 + 2 * 7168 + 1_835_008 + 44_040_192)
    # rank 1: layers 1 and 2 are dense
    dense_layers = 2 * (3 * 7168 * 18_432 - 1_835_008 - 44_040_192)
    assert rank_params(deepseek_256, 1).dense == rank.dense + dense_layers


def test_an_mtp_stage_holds_its_own_copy_of_the_embedding(deepseek_256: Recipe) -> None:
    layout = deepseek_256.parallel.model_copy(update={"layout": "Et|(tt|)*30mL"})
    recipe = deepseek_256.model_copy(update={"num_mtp_layers": 1, "parallel": layout})
    parts = rank_weights(recipe, 3)
    assert parts[Part.INPUT_EMBEDDING].total == 129_280 * 7168
    assert parts[Part.LM_HEAD].total == 129_280 * 7168


@st.composite
def layout_strings(draw: st.DrawFn, *, num_layers: int, num_mtp_layers: int, num_chunks: int) -> str:
    """Any legal distribution of the layers over the chunks, MTP modules behind the last decoder layer."""
    cuts = sorted(
        draw(st.lists(st.integers(0, num_layers), min_size=num_chunks - 1, max_size=num_chunks - 1))
    )
    stages = ["t" * (last - first) for first, last in itertools.pairwise([0, *cuts, num_layers])]
    last_with_layers = max(index for index, stage in enumerate(stages) if stage)
    stages[draw(st.integers(last_with_layers, num_chunks - 1))] += "m" * num_mtp_layers
    return "E" + "|".join(stages) + "L"


@st.composite
def layouts(draw: st.DrawFn, model: ModelSpec, *, num_mtp_layers: int) -> ParallelSpec:
    pipeline = draw(st.integers(1, 4))
    tensor = draw(st.sampled_from([size for size in (1, 2, 4) if model.vocab_size % size == 0]))
    virtual = draw(st.integers(1, 3)) if pipeline > 1 else 1
    expert, expert_tensor = draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 2]))
    replicas = draw(st.integers(1, 3))
    return ParallelSpec(
        num_gpus=pipeline * tensor * expert * expert_tensor * replicas,
        tensor=tensor,
        pipeline=pipeline,
        virtual_pipeline=virtual,
        layout=draw(
            layout_strings(
                num_layers=model.num_layers, num_mtp_layers=num_mtp_layers, num_chunks=pipeline * virtual
            )
        ),
        expert=expert,
        expert_tensor=expert_tensor,
    )


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_all_ranks_together_hold_every_parameter_once_per_replica(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker, data: st.DataObject
) -> None:
    model = models[data.draw(st.sampled_from(sorted(models)))]
    num_mtp = data.draw(st.integers(0, model.num_mtp_layers))
    parallel = data.draw(layouts(model, num_mtp_layers=num_mtp))
    recipe = make_recipe(model, parallel, num_mtp_layers=num_mtp)
    ranks = [rank_params(recipe, rank) for rank in range(parallel.pipeline)]

    everything = sum_parts(
        [main_weights(model, num_experts=None, family=recipe.kernels.family)]
        + [mtp_weights(model, num_experts=None, family=recipe.kernels.family)] * num_mtp
    )
    experts = everything[Part.ROUTED_EXPERTS]
    dense = sum(
        (weights for part, weights in everything.items() if part is not Part.ROUTED_EXPERTS), Weights()
    )
    stages = (parallel.layout or "").split("|")
    num_embedding_copies = sum("m" in stage and "E" not in stage for stage in stages)
    num_embedding_copies += model.tied_embeddings and len(stages) > 1

    # one replica: all tensor, pipeline and expert ranks; replicated weights stand on every tensor rank
    held = parallel.tensor * sum(rank.dense for rank in ranks)
    held_experts = parallel.expert * parallel.expert_tensor * sum(rank.expert for rank in ranks)
    copies = num_embedding_copies * model.vocab_size * model.hidden_size
    assert held == dense.sharded + copies + parallel.tensor * dense.replicated
    assert held_experts == experts.sharded + parallel.expert_tensor * experts.replicated


def test_every_part_of_a_pyramid_with_residual_experts_matches_a_hand_count(
    models: dict[str, ModelSpec],
) -> None:
    # 24 layers of width 1024, 12 of them with experts: 10 x 32 and 2 x 64; biases but for the router
    mlp = 2 * 1024 * 4096 + 4096 + 1024
    parts = main_weights(models["pr_moe_350m"], num_experts=None, family=None)
    assert {part: weights.total for part, weights in parts.items()} == {
        Part.INPUT_EMBEDDING: 50_257 * 1024 + 2048 * 1024,
        Part.ATTENTION: 24 * (4 * 1024 * 1024 + 4 * 1024),
        Part.NORMS: 24 * 2 * 2 * 1024 + 2 * 1024,
        Part.ROUTER: 448 * 1024,
        Part.ROUTED_EXPERTS: 448 * mlp,
        Part.SHARED_EXPERTS: 12 * (mlp + 2 * 1024 + 2),
        Part.DENSE_MLP: 12 * mlp,
    }
    assert whole(models["pr_moe_350m"]) == 4_116_745_240
    assert whole(models["pr_moe_1_3b"]) == pytest.approx(31.4e9, rel=0.01)


def test_a_mamba_layer_matches_a_hand_count() -> None:
    # Nemotron 3 Nano: d = 64 x 64 = 4096, 2 G N = 2048
    mamba = Mamba2(num_heads=64, head_dim=64, state_size=128, num_groups=8)
    projections = 2688 * (2 * 4096 + 2048 + 64) + 4096 * 2688
    assert mamba_params(mamba, hidden=2688) == Weights(projections + 6144 * 5 + 3 * 64 + 4096)


def test_a_gated_delta_net_matches_a_hand_count() -> None:
    # Qwen3-Next: K = 16 x 128 = 2048, V = 32 x 128 = 4096; its norm is shared by all heads
    net = GatedDeltaNet(
        num_key_heads=16, key_head_dim=128, num_value_heads=32, value_head_dim=128, full_attention_every=4
    )
    projections = 2048 * (2 * 2048 + 2 * 4096 + 64) + 4096 * 2048
    assert gated_delta_net_params(net, hidden=2048) == Weights(projections + 8192 * 4 + 64, 128)


def test_latent_experts_are_narrow_and_their_projections_are_repeated_on_every_rank(loader: Loader) -> None:
    model = loader.model("nemotron_3_super_120b_a12b")
    parts = structure_weights(model, model.layer(1), num_experts=512, family=None)
    assert parts[Part.ROUTED_EXPERTS] == Weights(512 * 2 * 1024 * 2688)
    assert parts[Part.LATENT_PROJECTIONS] == Weights(0, 2 * 4096 * 1024)
    assert parts[Part.SHARED_EXPERTS] == Weights(2 * 4096 * 5376)
    assert parts[Part.NORMS] == Weights(0, 4096)  # a half layer has one


def test_an_ungated_mlp_has_two_matrices_and_their_biases() -> None:
    assert mlp_params(hidden=12288, ffn=49152, bias=True, is_gated=False) == Weights(
        2 * 12288 * 49152 + 49152, 12288
    )


def test_an_output_gate_is_as_large_as_the_queries() -> None:
    shape = {"hidden": 2048, "num_heads": 16, "num_query_groups": 2, "head_dim": 256}
    with_gate, without = (
        grouped_query_attention_params(**shape, qkv_bias=False, output_bias=False, output_gate=gate)
        for gate in (True, False)
    )
    assert with_gate.total - without.total == 2048 * 16 * 256
