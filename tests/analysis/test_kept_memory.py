"""What stays on the GPU of a layer's kept tensors, in low precision and with offload."""

from __future__ import annotations

import pytest

from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.memory import pipeline_memory
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import Offload, Precision, Recipe
from tests.analysis.conftest import RecipeMaker

TOKENS = 4096


@pytest.fixture(scope="module")
def dense(loader: Loader, make_recipe: RecipeMaker) -> Recipe:
    return make_recipe(loader.model("llama3_8b"), ParallelSpec(num_gpus=8))


@pytest.fixture(scope="module")
def sparse(models: dict[str, ModelSpec], make_recipe: RecipeMaker) -> Recipe:
    return make_recipe(models["qwen3_30b_a3b"], ParallelSpec(num_gpus=8, expert=8))


def kept(recipe: Recipe, *, is_moe: bool) -> dict[str, int]:
    return dict(ModelMemory(recipe).layer(is_moe=is_moe, is_recomputed=False).kept)


def with_precision(recipe: Recipe, precision: Precision) -> Recipe:
    return recipe.model_copy(update={"precision": precision})


def test_inputs_of_products_are_kept_in_one_byte_in_fp8(dense: Recipe) -> None:
    high = kept(dense, is_moe=False)
    low = kept(with_precision(dense, "fp8_tensorwise"), is_moe=False)
    for name in ("attention_norm", "mlp_norm", "mlp_hidden"):
        assert low[name] == high[name] // 2
    # core attention keeps its output in BF16, the product behind it keeps it in FP8
    assert low["output"] == high["output"]
    assert low["output_for_projection"] == high["output"] // 2
    assert low["mlp_up"] == high["mlp_up"]


def test_scales_of_blocks_are_counted(dense: Recipe) -> None:
    high = kept(dense, is_moe=False)["mlp_hidden"]
    assert kept(with_precision(dense, "mxfp8"), is_moe=False)["mlp_hidden"] == high * 33 // 64
    assert kept(with_precision(dense, "nvfp4"), is_moe=False)["mlp_hidden"] == high * 9 // 32


def test_the_router_reads_its_norm_in_high_precision(sparse: Recipe) -> None:
    high, low = (kept(recipe, is_moe=True) for recipe in (sparse, with_precision(sparse, "mxfp8")))
    assert low["mlp_norm"] == high["mlp_norm"]
    assert low["attention_norm"] < high["attention_norm"]


def test_an_offloaded_module_leaves_nothing_behind(sparse: Recipe) -> None:
    asked = sparse.model_copy(update={"offload": Offload(modules=("expert_fc1", "moe_act"))})
    before, after = kept(sparse, is_moe=True), kept(asked, is_moe=True)
    assert before.keys() - after.keys() == {"expert_input", "expert_up"}
    # 8 experts per token, hidden size 2048, BF16
    assert before["expert_input"] == TOKENS * 8 * 2048 * 2
    # the fullest moment is the loss, where no layer is at work
    saved = pipeline_memory(sparse)[0].total_bytes - pipeline_memory(asked)[0].total_bytes
    assert saved == 48 * (before["expert_input"] + before["expert_up"])


def test_offloaded_layers_free_what_they_keep_but_for_one_at_work(dense: Recipe) -> None:
    def held(num_layers: int) -> int:
        offload = Offload(num_activation_layers=num_layers)
        return pipeline_memory(dense.model_copy(update={"offload": offload}))[0].total_bytes

    layer = sum(kept(dense, is_moe=False).values())
    assert held(0) - held(8) == held(8) - held(16) == 8 * layer


def test_blackwell_keeps_one_copy_of_weights_in_per_tensor_fp8(dense: Recipe, loader: Loader) -> None:
    low = with_precision(dense, "fp8_tensorwise")
    on_blackwell = low.model_copy(update={"system": loader.system("b200")})
    hopper, blackwell = (pipeline_memory(recipe)[0].weights_bytes for recipe in (low, on_blackwell))
    bf16 = pipeline_memory(dense)[0].weights_bytes
    assert hopper - bf16 == 2 * (blackwell - bf16)


def test_megatron_fsdp_keeps_a_shard_of_quantized_weights(dense: Recipe) -> None:
    sharded = dense.parallel.model_copy(
        update={"data_sharding": "megatron_fsdp", "fsdp_strategy": "optim_grads_params"}
    )
    low = with_precision(dense, "fp8_tensorwise")
    whole = pipeline_memory(low)[0].weights_bytes - pipeline_memory(dense)[0].weights_bytes
    shard = (
        pipeline_memory(low.model_copy(update={"parallel": sharded}))[0].weights_bytes
        - pipeline_memory(dense.model_copy(update={"parallel": sharded}))[0].weights_bytes
    )
    assert shard == pytest.approx(whole / 8)


def test_a_chunk_may_be_the_embedding_alone(loader: Loader, make_recipe: RecipeMaker) -> None:
    parallel = ParallelSpec(num_gpus=4, pipeline=4, layout="E|t*11|t*11|t*10L")
    recipe = make_recipe(loader.model("llama3_8b"), parallel)
    assert all(rank.total_bytes > rank.states_bytes for rank in pipeline_memory(recipe))
