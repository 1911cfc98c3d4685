"""States by hand and beside a dry run of Megatron-Core, transients, and the verdict whether a recipe fits."""

import pytest

from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.dispatch_buffers import dispatch_buffer_bytes
from moe_bench.analysis.memory import (
    CONTEXT_BYTES,
    GIB,
    fits,
    gradients_bytes,
    memory_fit,
    needed_bytes,
    optimizer_bytes,
    pipeline_memory,
    rank_memory,
    weights_bytes,
)
from moe_bench.analysis.params import RankParams, rank_params
from moe_bench.errors import BadInputError
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import (
    CudaGraphs,
    Fusions,
    KernelSpec,
    LowPrecision,
    Offload,
    OptimizerSpec,
    Recipe,
    Recompute,
)
from tests.analysis.conftest import BF16_STATES, RecipeMaker

PARAMS = RankParams(dense=1000, expert=3000)
EIGHT_GPUS = ParallelSpec(num_gpus=8, expert=4)
"""Dense weights over eight shards, experts over two."""


def test_deepseek_on_256_gpus_holds_46_gib_of_states_instead_of_69(deepseek_256: Recipe) -> None:
    sixteen_layers = rank_memory(deepseek_256, 2)
    # 2.8186 G expert parameters unsharded, 12 bytes each, and 3.9943 G dense ones at 4 + 8 / 64 bytes
    rank = rank_params(deepseek_256, 2)
    assert sixteen_layers.states_bytes == 12 * rank.expert + 4 * rank.dense + 8 * rank.dense // 64
    assert sixteen_layers.states_bytes / GIB == pytest.approx(46, abs=0.5)
    in_fp32 = deepseek_256.model_copy(update={"optimizer": OptimizerSpec()})
    assert rank_memory(in_fp32, 2).states_bytes / GIB == pytest.approx(69, abs=0.5)


def test_states_equal_what_a_dry_run_of_megatron_allocates(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    # Megatron-Core 0.19.2 on meta tensors, stage 0 of 60 layers over PP4 and EP64: parameter buffer 14.132,
    # gradient buffer 28.264, optimizer 24.581 GiB
    recipe = make_recipe(
        models["deepseek_v3"].model_copy(update={"num_layers": 60}),
        ParallelSpec(num_gpus=256, pipeline=4, expert=64),
        recompute=Recompute(granularity="full", num_layers=1),
    )
    stage = rank_memory(recipe, 0)
    assert stage.weights_bytes / GIB == pytest.approx(14.132, abs=0.001)
    assert stage.gradients_bytes / GIB == pytest.approx(28.264, abs=0.001)
    assert stage.optimizer_bytes / GIB == pytest.approx(24.581, abs=0.001)


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_param"),
    [
        (OptimizerSpec(), 12),
        (BF16_STATES, 8),
        (OptimizerSpec(exp_avg_dtype="fp8", exp_avg_sq_dtype="fp16", main_params_dtype="fp16"), 5),
        (OptimizerSpec(name="muon"), 8),
        (OptimizerSpec(name="sgd", exp_avg_dtype="bf16"), 6),
    ],
)
def test_optimizer_states_follow_their_types(
    models: dict[str, ModelSpec],
    make_recipe: RecipeMaker,
    optimizer: OptimizerSpec,
    bytes_per_param: int,
) -> None:
    recipe = make_recipe(models["mixtral_8x7b"], EIGHT_GPUS, optimizer=optimizer)
    assert optimizer_bytes(recipe, PARAMS) == bytes_per_param * (1000 // 8 + 3000 // 2)


@pytest.mark.parametrize(
    ("sharding", "weights", "gradients", "states"),
    [
        ({"data_sharding": "none"}, 8000, 16_000, 48_000),
        ({"data_sharding": "distributed_optimizer"}, 8000, 16_000, 12 * 1625),
        ({"data_sharding": "distributed_optimizer", "num_optimizer_instances": 2}, 8000, 16_000, 39_000),
        ({"data_sharding": "megatron_fsdp", "fsdp_strategy": "optim"}, 8000, 16_000, 12 * 1625),
        ({"data_sharding": "megatron_fsdp", "fsdp_strategy": "optim_grads"}, 8000, 4 * 1625, 12 * 1625),
        (
            {"data_sharding": "megatron_fsdp", "fsdp_strategy": "optim_grads_params"},
            2 * 1625,
            4 * 1625,
            12 * 1625,
        ),
    ],
)
def test_each_sharding_divides_what_it_says(
    models: dict[str, ModelSpec],
    make_recipe: RecipeMaker,
    sharding: dict[str, object],
    weights: int,
    gradients: int,
    states: int,
) -> None:
    recipe = make_recipe(models["mixtral_8x7b"], EIGHT_GPUS.model_copy(update=sharding))
    assert weights_bytes(recipe, PARAMS) == weights
    assert gradients_bytes(recipe, PARAMS) == gradients
    assert optimizer_bytes(recipe, PARAMS) == states


def test_fp32_weights_are_their_own_main_copy(models: dict[str, ModelSpec], make_recipe: RecipeMaker) -> None:
    recipe = make_recipe(models["mixtral_8x7b"], EIGHT_GPUS, precision="fp32")
    assert weights_bytes(recipe, PARAMS) == 4 * 4000
    assert optimizer_bytes(recipe, PARAMS) == 8 * 1625


def test_an_offloaded_share_of_the_optimizer_leaves_the_device(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(models["mixtral_8x7b"], EIGHT_GPUS, offload=Offload(optimizer_fraction=0.75))
    assert optimizer_bytes(recipe, PARAMS) == 3 * 1625


def test_fp8_adds_two_byte_copies_unless_weights_live_in_fp8(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    model = models["qwen3_30b_a3b"]
    bf16, fp8, fp8_only = (
        rank_memory(make_recipe(model, EIGHT_GPUS, precision=precision, low_precision=low), 0)
        for precision, low in (
            ("bf16", None),
            ("fp8_blockwise", None),
            ("fp8_blockwise", LowPrecision(param_gather=True)),
        )
    )
    copies = fp8.weights_bytes - bf16.weights_bytes
    # all products but embedding, head and router: 48 layers of attention and 32 local experts
    assert copies == 2 * 48 * (18_874_368 + 32 * 3 * 2048 * 768)
    assert fp8_only.weights_bytes == copies


@pytest.mark.parametrize(("cross_entropy", "bytes_per_logit"), [("none", 10), ("native", 6), ("te", 4)])
def test_the_loss_is_where_a_model_with_few_layers_is_fullest(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker, cross_entropy: str, bytes_per_logit: int
) -> None:
    kernels = KernelSpec(family="torch_native", fusions=Fusions(cross_entropy=cross_entropy))
    model = models["qwen3_30b_a3b"].model_copy(update={"num_layers": 2})
    parallel = ParallelSpec(num_gpus=8, expert=8)
    stage = rank_memory(make_recipe(model, parallel, kernels=kernels), 0)
    without = rank_memory(
        make_recipe(model.model_copy(update={"vocab_size": 128}), parallel, kernels=kernels), 0
    )
    assert stage.peak_at == "forward of loss"
    assert without.peak_at != "forward of loss"
    assert stage.activations_bytes > bytes_per_logit * 4096 * 151_936
    assert stage.activations_bytes - bytes_per_logit * 4096 * 151_936 < without.activations_bytes


def test_products_that_add_up_weight_gradients_hand_out_one_placeholder_per_shape(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    parallel = ParallelSpec(num_gpus=8, expert=8)
    apart, added = (
        rank_memory(
            make_recipe(
                models["qwen3_30b_a3b"],
                parallel,
                kernels=KernelSpec(family="transformer_engine", fusions=Fusions(gradient_accumulation=is_it)),
            ),
            0,
        )
        for is_it in (False, True)
    )
    # queries, keys and values; output; both halves of an expert's first projection; its second one; the head
    elements = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048 + 2 * 768 * 2048 + 768 * 2048 + 151_936 * 2048
    assert apart.peak_at == added.peak_at == "forward of loss"
    assert added.activations_bytes - apart.activations_bytes == 2 * elements


def test_every_chunk_in_flight_but_those_with_an_embedding_has_come_from_a_neighbour(
    deepseek_256: Recipe,
) -> None:
    vector_bytes = 2 * 4096 * 7168
    received = [stage.pipeline_bytes // vector_bytes for stage in pipeline_memory(deepseek_256)]
    for rank in (1, 2, 3):
        # the warm-up of seven groups of four, and one more; what has come for the next passes is beside them
        assert 0 <= received[rank] - (2 * (3 - rank) + 28 + 1) <= 2 * 8
    assert received[0] < received[1]


def test_selective_recomputation_brings_back_one_layer(deepseek_256: Recipe) -> None:
    selective = Recompute(granularity="selective", modules=("moe",))
    stage = rank_memory(deepseek_256.model_copy(update={"recompute": selective}), 2)
    assert stage.peak_at == "backward of experts"
    row_bytes = 4096 * 8 * 2 * 7168
    # rows permuted, received and sorted, what comes out of the experts and that sorted back
    assert 5 * row_bytes < stage.recomputed_bytes < 8 * row_bytes


def test_a_rank_with_busy_experts_keeps_the_rows_that_it_receives_beyond_the_mean(
    deepseek_256: Recipe,
) -> None:
    even, busy = (
        ModelMemory(deepseek_256, load=load).layer(is_moe=True, is_recomputed=False) for load in (1.0, 1.5)
    )
    in_order, gated, activated = 7168, 2 * 2048, 2048
    assert busy.kept_bytes - even.kept_bytes == 2 * (0.5 * 4096 * 8) * (in_order + gated + activated)
    assert pipeline_memory(deepseek_256, load=1.0) == pipeline_memory(deepseek_256)


def test_shared_experts_beside_the_dispatch_keep_the_sequence_that_they_gathered(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    plain = make_recipe(
        models["moonlight_16b_a3b"], ParallelSpec(num_gpus=8, tensor=2, expert=8, sequence_parallel=True)
    )
    beside = plain.model_copy(update={"overlap": plain.overlap.model_copy(update={"shared_experts": True})})
    kept = [
        ModelMemory(recipe).layer(is_moe=True, is_recomputed=False).kept_bytes for recipe in (plain, beside)
    ]
    assert kept[1] - kept[0] == 2 * 4096 * 2048


def test_memory_never_falls_with_skew(deepseek_256: Recipe) -> None:
    needs = [
        needed_bytes(memory_fit(deepseek_256, load=load).worst) for load in (1.0, 1.01, 1.1, 1.5, 2.0, 4.0)
    ]
    assert needs == sorted(needs)
    assert len(set(needs)) == len(needs)


def test_megatron_fsdp_holds_whole_layers_and_gradients_that_wait(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    fsdp = ParallelSpec(num_gpus=8, expert=8, data_sharding="megatron_fsdp")
    stage = rank_memory(make_recipe(models["qwen3_30b_a3b"], fsdp), 0)
    # of 48 layers of 94 M weights the one at work and those up to half a billion ahead are whole, beside
    # embedding and head
    dense, experts = 18_874_368 + 256 + 4096 + 2048 * 128, 16 * 3 * 2048 * 768
    outside = 2 * 151_936 * 2048 + 2048
    layers = (dense + experts) + 5 * (dense + experts) + experts
    assert stage.gathered_bytes == pytest.approx(2 * (outside + layers), rel=2e-3)
    # up to a billion gradients wait, and one more buffer is filled
    assert 4 * 1.0e9 < stage.backward_bytes - 4 * outside < 4 * 1.2e9 + 2e9


def test_the_parts_add_up_and_the_margins_come_on_top(deepseek_256: Recipe) -> None:
    for stage in pipeline_memory(deepseek_256):
        assert stage.total_bytes == (
            stage.weights_bytes
            + stage.gradients_bytes
            + stage.optimizer_bytes
            + stage.activations_bytes
            + stage.transient_bytes
        )
        assert stage.total_bytes == sum(stage.bytes_by_category.values())
        assert needed_bytes(stage) > stage.total_bytes + CONTEXT_BYTES


def test_buffers_and_graphs_are_in_the_margin_alone(deepseek_256: Recipe) -> None:
    plain = rank_memory(deepseek_256, 1)
    whole = rank_memory(
        deepseek_256.model_copy(update={"cuda_graphs": CudaGraphs(implementation="full_iteration")}), 1
    )
    assert whole.total_bytes == plain.total_bytes
    passing = plain.activations_bytes + plain.recomputed_bytes + plain.backward_bytes
    assert needed_bytes(whole) - needed_bytes(plain) == passing
    dispatch = deepseek_256.dispatch.model_copy(update={"dispatcher": "deepep"})
    buffered = deepseek_256.model_copy(update={"dispatch": dispatch})
    assert rank_memory(buffered, 1).outside_bytes == dispatch_buffer_bytes(buffered)
    assert plain.outside_bytes == 0


def test_recomputation_decides_whether_deepseek_fits_256_gpus(deepseek_256: Recipe) -> None:
    assert not fits(deepseek_256)
    recomputed = deepseek_256.model_copy(update={"recompute": Recompute(granularity="full", num_layers=1)})
    verdict = memory_fit(recomputed)
    assert verdict.fits
    assert verdict.worst.total_bytes / GIB < 79.1 - CONTEXT_BYTES / GIB


def test_more_recomputation_never_needs_more_memory_in_flight(deepseek_256: Recipe) -> None:
    modules = ("mla_up_proj", "layernorm", "moe_act", "mlp", "moe")
    held = []
    for num_modules in range(len(modules) + 1):
        recompute = Recompute(granularity="selective", modules=modules[:num_modules])
        held.append(
            rank_memory(deepseek_256.model_copy(update={"recompute": recompute}), 1).activations_bytes
        )
    assert held == sorted(held, reverse=True)
    assert len(set(held)) == len(held)


def test_a_machine_without_a_gpu_has_no_verdict(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker, loader: Loader
) -> None:
    recipe = make_recipe(models["olmoe_1b_7b"], EIGHT_GPUS, system=loader.system("cpu_host"))
    with pytest.raises(BadInputError, match="cpu_host has no GPU"):
        fits(recipe)
