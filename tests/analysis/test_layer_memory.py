"""What a layer keeps per token by hand, what recomputation frees, and passes that let go of all they took."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.analysis.expert_memory import GroupedProducts
from moe_bench.analysis.layer_memory import LayerMemory, LayerWalk
from moe_bench.analysis.layer_sizes import expert_sizes, layer_sizes
from moe_bench.analysis.live_tensors import LiveTensors
from moe_bench.analysis.memory import rank_memory
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import (
    DispatchSpec,
    Fusions,
    KernelSpec,
    Overlap,
    Recipe,
    Recompute,
    RecomputeModule,
    TokenDrop,
)
from tests.analysis.conftest import RecipeMaker

TOKENS = 4096
ONE_NODE = ParallelSpec(num_gpus=8)
FUSED = Fusions(permute=True, router=True, rope=True, activation=True, cross_entropy="te")
TRANSFORMER_ENGINE = KernelSpec(family="transformer_engine", fusions=FUSED)
TORCH = KernelSpec(family="torch_native", fusions=FUSED)


def walked(recipe: Recipe, *, is_moe: bool, is_recomputed: bool = False) -> LayerMemory:
    return LayerWalk(recipe, layer_sizes(recipe), is_moe=is_moe).memory(is_recomputed=is_recomputed)


def test_a_deepseek_expert_layer_matches_a_hand_count(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(
        models["deepseek_v3"], ParallelSpec(num_gpus=8, expert=8), kernels=TRANSFORMER_ENGINE
    )
    kept = {name: size // TOKENS for name, size in walked(recipe, is_moe=True).kept.items()}
    assert kept == {
        "layer_input": 2 * 7168,
        "attention_norm": 2 * 7168,
        "query_latent": 2 * 1536,
        "query_latent_normed": 2 * 1536,
        "latent": 2 * (512 + 64),
        "latent_normed": 2 * 512,
        "query_product": 2 * 128 * 192,
        "keys": 2 * 128 * 192,
        "values": 2 * 128 * 128,
        "output": 2 * 128 * 128,
        "statistics": 4 * 128,
        "mlp_input": 2 * 7168,
        "mlp_norm": 2 * 7168,
        "shared_up": 2 * 2 * 2048,
        "shared_hidden": 2 * 2048,
        "routing_map": 256,
        "scores": 4 * 256,
        "aux_scores": 4 * 256,
        "row_map": 4 * (2 * 256 + 1) + 4 * 4 * 8,
        "expert_input": 2 * 8 * 7168,
        "expert_up": 2 * 2 * 8 * 2048,
        "expert_hidden": 2 * 8 * 2048,
    }


def test_a_dense_layer_with_tensor_parallelism_matches_a_hand_count(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    parallel = ParallelSpec(num_gpus=8, tensor=2, sequence_parallel=True)
    kept = walked(make_recipe(models["glm_4_5_air"], parallel, kernels=TORCH), is_moe=False).kept
    assert kept["mlp_up"] == 2 * 2 * TOKENS * 10_944 // 2
    assert kept["mlp_input"] == 2 * (TOKENS // 2) * 4096
    assert kept["qkv"] == 2 * TOKENS * 128 * (96 + 2 * 8) // 2
    # both are rotated into tensors of their own; values stay where they are
    assert (kept["queries"], kept["keys"]) == (2 * TOKENS * 128 * 48, 2 * TOKENS * 128 * 4)


def test_the_peaks_of_a_mixtral_layer_match_a_hand_count(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(models["mixtral_8x7b"], ParallelSpec(num_gpus=8, expert=8), kernels=TORCH)
    layer = walked(recipe, is_moe=True)
    rows, vector = TOKENS * 2, 2 * TOKENS * 4096
    row_bytes, hidden = 2 * rows * 4096, 2 * rows * 14_336
    attention = layer.before_dispatch_bytes
    # rows permuted, received (what the one local expert reads), coming out and sent back; gate, up, product
    assert layer.forward.total_bytes == attention + probabilities(recipe) + 4 * row_bytes + 3 * hidden
    # rows received, their gradient, the gradient of the activation's inputs and output, the weight's
    expected = attention + row_bytes + 3 * hidden + vector + row_bytes + 3 * hidden + 2 * 4096 * 14_336
    assert layer.mlp_backward.total_bytes == expected
    assert layer.backward.place == "experts"


def probabilities(recipe: Recipe) -> int:
    assert recipe.model.moe is not None
    return 4 * TOKENS * recipe.model.moe.num_experts


MODULES: tuple[tuple[tuple[RecomputeModule, ...], set[str]], ...] = (
    (("moe_act",), {"expert_hidden"}),
    (("layernorm",), {"attention_norm", "mlp_norm"}),
    (("mla_up_proj",), {"query_product", "keys"}),
    # which keeps the values, padded, in the place of those of the up-projection
    (("core_attn",), {"statistics", "values_padded", "output_padded"}),
    (("shared_experts",), {"shared_up", "shared_hidden"}),
)


@pytest.mark.parametrize(("modules", "freed"), MODULES)
def test_each_recompute_module_frees_its_tensors(
    models: dict[str, ModelSpec],
    make_recipe: RecipeMaker,
    modules: tuple[RecomputeModule, ...],
    freed: set[str],
) -> None:
    recipe = make_recipe(models["deepseek_v3"], ONE_NODE, kernels=TORCH)
    whole = walked(recipe, is_moe=True)
    selective = Recompute(granularity="selective", modules=modules)
    layer = walked(recipe.model_copy(update={"recompute": selective}), is_moe=True)
    assert set(whole.kept) - set(layer.kept) == freed


def test_fp8_with_a_scale_per_row_holds_copies_of_the_factors_while_it_multiplies_them(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    parallel = ParallelSpec(num_gpus=8, expert=8)
    kernels = KernelSpec(family="torch_native")
    plain = make_recipe(models["mixtral_8x7b"], parallel, kernels=kernels)
    rowwise = plain.model_copy(update={"precision": "fp8_rowwise"})
    kept = [walked(recipe, is_moe=True).kept for recipe in (plain, rowwise)]
    assert kept[0] == kept[1]
    moe = plain.model.moe
    assert moe is not None
    peaks = []
    for recipe in (plain, rowwise):
        sizes, live = layer_sizes(recipe), LiveTensors()
        live.make("expert_input", 2 * 8192 * 4096)
        GroupedProducts(recipe, sizes, expert_sizes(recipe, moe, sizes)).forward(live, is_saved=True)
        peaks.append(live.peak.total_bytes)
    # the second product is the fullest: 8,192 rows of 14,336 with FP32 scales
    assert peaks[1] - peaks[0] == 8192 * (14_336 + 4)


def test_fp8_copies_of_the_experts_weights_stay_over_a_step(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    parallel = ParallelSpec(num_gpus=8, expert=8)
    plain = make_recipe(models["mixtral_8x7b"], parallel, kernels=KernelSpec(family="torch_native"))
    rowwise = plain.model_copy(update={"precision": "fp8_rowwise"})
    more = rank_memory(rowwise, 0).weights_bytes - rank_memory(plain, 0).weights_bytes
    # 32 layers of one expert: its weights twice, and scales of 28,672 + 4,096 and 4,096 + 14,336 rows
    assert more == 32 * (2 * 3 * 4096 * 14_336 + 4 * (28_672 + 4096 + 4096 + 14_336))


def test_recomputing_the_experts_keeps_their_input_alone(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    selective = Recompute(granularity="selective", modules=("moe",))
    parallel = ParallelSpec(num_gpus=64, expert=64)
    recipe = make_recipe(models["deepseek_v3"], parallel, kernels=TORCH, recompute=selective)
    layer = walked(recipe, is_moe=True)
    assert [name for name in layer.kept if name.startswith(("expert", "shared", "scores", "row"))] == []
    assert "mlp_norm" in layer.kept
    # rows permuted, received, sorted, coming out of the experts and sorted back, all of them made again
    assert layer.mlp_backward.held.recomputed_bytes > 5 * 2 * TOKENS * 8 * 7168


def test_full_recomputation_keeps_the_input_alone_and_brings_the_rest_back(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(models["qwen3_30b_a3b"], ONE_NODE, kernels=TORCH)
    whole, again = (walked(recipe, is_moe=True, is_recomputed=is_it) for is_it in (False, True))
    assert again.kept == {"layer_input": 2 * TOKENS * 2048}
    # the layer's output is made once more, and kept until the backward pass is through
    assert again.backward.total_bytes >= whole.backward.total_bytes + 2 * TOKENS * 2048
    assert again.forward.total_bytes < whole.forward.total_bytes


def test_a_fused_norm_keeps_its_output_whatever_is_recomputed(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    selective = Recompute(granularity="selective", modules=("layernorm",))
    fused, separate = (
        walked(
            make_recipe(models["mixtral_8x7b"], ONE_NODE, kernels=kernels, recompute=selective), is_moe=True
        )
        for kernels in (TRANSFORMER_ENGINE, TORCH)
    )
    assert "attention_norm" in fused.kept
    assert "attention_norm" not in separate.kept
    assert "mlp_norm" not in fused.kept


def test_only_torch_pads_the_values_of_latent_attention(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    model = models["deepseek_v3"]
    torch, engine = (
        walked(make_recipe(model, ONE_NODE, kernels=kernels), is_moe=True)
        for kernels in (TORCH, TRANSFORMER_ENGINE)
    )
    # values and output at the keys' width and the output cut, instead of values and output
    maps = ("row_map", "aux_scores")
    kept = [sum(size for name, size in one.kept.items() if name not in maps) for one in (torch, engine)]
    assert kept[0] - kept[1] == 2 * TOKENS * 128 * (2 * 192 + 128 - 2 * 128)


def test_our_permutation_and_router_keep_what_their_kernels_read(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    torch, engine = (
        walked(make_recipe(models["deepseek_v3"], ONE_NODE, kernels=kernels), is_moe=True).kept
        for kernels in (TORCH, TRANSFORMER_ENGINE)
    )
    # 8 rows and 8 experts of each token, the order of its 8 rows and their probabilities: int32 and FP32
    assert torch["row_map"] == 4 * TOKENS * (8 + 8 + 8 + 8)
    # TE: 2 x 256 + 1 of each token, orders and probabilities of its 8 rows on both ways
    assert engine["row_map"] == 4 * TOKENS * (2 * 256 + 1 + 4 * 8)
    assert engine["scores"] == torch["scores"] == engine["aux_scores"] == 4 * TOKENS * 256
    assert "aux_scores" not in torch


def test_attention_that_is_not_fused_keeps_every_score(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    unfused = KernelSpec(family="transformer_engine", attention="unfused")
    kept = walked(make_recipe(models["mixtral_8x7b"], ONE_NODE, kernels=unfused), is_moe=True).kept
    assert kept["statistics"] == 2 * TOKENS * TOKENS * 32


def test_expert_parallelism_trades_tokens_and_does_not_shed_them(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    model = models["qwen3_30b_a3b"]
    alone = walked(make_recipe(model, ONE_NODE), is_moe=True)
    spread = walked(make_recipe(model, ParallelSpec(num_gpus=8, expert=8)), is_moe=True)
    assert alone.kept == spread.kept


def test_expert_tensor_parallelism_gathers_the_tokens_and_divides_the_width(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    model = models["mixtral_8x7b"]
    alone = walked(make_recipe(model, ONE_NODE), is_moe=True).kept
    split = walked(make_recipe(model, ParallelSpec(num_gpus=8, expert_tensor=2)), is_moe=True).kept
    assert split["expert_input"] == 2 * alone["expert_input"]
    assert split["expert_up"] == alone["expert_up"]


def test_fp8_keeps_the_inputs_of_expert_products_at_one_byte(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(models["qwen3_30b_a3b"], ONE_NODE, precision="fp8_blockwise")
    kept = walked(recipe, is_moe=True).kept
    assert kept["expert_input"] == TOKENS * 8 * 2048
    assert kept["expert_hidden"] == TOKENS * 8 * 768
    assert kept["expert_up"] == 2 * 2 * TOKENS * 8 * 768


def test_padding_to_capacity_costs_its_factor(models: dict[str, ModelSpec], make_recipe: RecipeMaker) -> None:
    model = models["mixtral_8x7b"]
    padded, dropping = (
        walked(make_recipe(model, ONE_NODE, token_drop=drop), is_moe=True).kept["expert_input"]
        for drop in (TokenDrop(capacity_factor=1.5, pad_to_capacity=True), TokenDrop(capacity_factor=1.5))
    )
    assert 2 * padded == 3 * dropping == 3 * 2 * TOKENS * 2 * 4096


def test_biases_of_experts_keep_the_rows_that_they_are_added_to(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(models["gpt_oss_20b"], ParallelSpec(num_gpus=8, expert=8), kernels=TORCH)
    kept = walked(recipe, is_moe=True).kept
    assert kept["bias_rows"] == kept["expert_input"] == 2 * TOKENS * 4 * 2880
    assert kept["members"] == 2 * TOKENS * 4 * (32 // 8)


modules = st.sets(
    st.sampled_from(("core_attn", "mla_up_proj", "layernorm", "mlp", "moe", "moe_act", "shared_experts"))
)


@given(
    key=st.sampled_from(("deepseek_v3", "moonlight_16b_a3b", "gpt_oss_20b", "olmoe_1b_7b", "glm_4_5_air")),
    tensor=st.sampled_from((1, 2)),
    context=st.sampled_from((1, 2)),
    expert=st.sampled_from((1, 4)),
    kernels=st.sampled_from((TORCH, TRANSFORMER_ENGINE, KernelSpec(family="torch_native"))),
    dispatcher=st.sampled_from(("alltoall", "allgather", "deepep")),
    is_overlapped=st.booleans(),
    is_moe=st.booleans(),
    is_recomputed=st.booleans(),
    recomputed=modules,
)
def test_every_backward_pass_lets_go_of_all_that_the_forward_pass_kept(
    models: dict[str, ModelSpec],
    make_recipe: RecipeMaker,
    key: str,
    tensor: int,
    context: int,
    expert: int,
    kernels: KernelSpec,
    dispatcher: str,
    is_overlapped: bool,
    is_moe: bool,
    is_recomputed: bool,
    recomputed: set[RecomputeModule],
) -> None:
    """`memory` raises where a tensor is left, is made twice or is let go of twice."""
    parallel = ParallelSpec(
        num_gpus=16,
        tensor=tensor,
        sequence_parallel=tensor > 1,
        context=context,
        context_comm="allgather",
        expert=expert,
    )
    recipe = make_recipe(
        models[key],
        parallel,
        kernels=kernels,
        dispatch=DispatchSpec(dispatcher=dispatcher),
        overlap=Overlap(expert_parallel=is_overlapped),
        recompute=Recompute(granularity="selective", modules=tuple(recomputed))
        if recomputed
        else Recompute(),
    )
    layer = walked(recipe, is_moe=is_moe, is_recomputed=is_recomputed)
    assert layer.forward.total_bytes >= layer.kept_bytes
    assert min(layer.backward.held) >= 0


@pytest.mark.parametrize(("kernels", "is_whole"), [(TRANSFORMER_ENGINE, True), (TORCH, False)])
def test_the_gradients_that_megatron_fsdp_takes_stand_beside_the_activations_of_transformer_engine_alone(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker, kernels: KernelSpec, is_whole: bool
) -> None:
    layout = {"num_gpus": 64, "expert": 8}
    plain, fsdp = (
        walked(
            make_recipe(
                models["mixtral_8x7b"],
                ParallelSpec.model_validate({**layout, "data_sharding": sharding}),
                kernels=kernels,
            ),
            is_moe=True,
        ).mlp_backward.held.total_bytes
        for sharding in ("distributed_optimizer", "megatron_fsdp")
    )
    # one expert of three matrices in FP32; ours comes when more than that is free of what the activation held
    assert fsdp - plain == is_whole * 4 * 3 * 4096 * 14_336
