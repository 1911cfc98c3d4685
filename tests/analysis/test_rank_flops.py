"""Operations of one rank by hand, and against what the whole job needs."""

from collections import Counter

import pytest

from moe_bench.analysis.flops import FlopsCounting, forward_flops_by_part
from moe_bench.analysis.params import Part
from moe_bench.analysis.rank_flops import EXPERT_BIAS, EXPERT_MIXING, Kernel, rank_flops
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import KernelSpec, Recipe, Recompute
from tests.analysis.conftest import RecipeMaker

SHIPPED = [str(path.relative_to(recipes_root()).with_suffix("")) for path in recipe_paths(recipes_root())]


@pytest.fixture(scope="module")
def stage(models: dict[str, ModelSpec], make_recipe: RecipeMaker) -> Recipe:
    """DeepSeek-V3 with 60 layers on 256 GPUs, PP4 EP64, one micro batch: 15 layers, the first 3 dense."""
    return make_recipe(
        models["deepseek_v3"].model_copy(update={"num_layers": 60}),
        ParallelSpec(num_gpus=256, pipeline=4, expert=64),
        global_batch_size=64,
    )


def forward_by_kernel(recipe: Recipe, pipeline_rank: int) -> Counter[Kernel]:
    counted = Counter[Kernel]()
    for line in rank_flops(recipe, pipeline_rank):
        counted[line.kernel] += line.forward_flops
    return counted


def test_the_forward_pass_of_a_stage_matches_a_hand_count(stage: Recipe) -> None:
    layer = 187_105_280
    expert = 3 * 7168 * 2048
    # 15 attentions, 3 dense MLPs, 12 shared experts and routers
    weights = 15 * layer + 3 * 3 * 7168 * 18_432 + 12 * (expert + 256 * 7168)
    assert weights == 4_546_166_784
    assert forward_by_kernel(stage, 0) == {
        Kernel.GEMM: 2 * 4096 * weights,
        Kernel.GROUPED: 12 * 2 * 4096 * 8 * expert,
        Kernel.ATTENTION: 15 * 2 * 128 * (4096 * 4096 // 2) * (192 + 128),
    }


def test_two_of_three_expert_products_are_fp8_with_a_scale_per_row(stage: Recipe) -> None:
    recompute = Recompute(granularity="full", num_layers=1)
    rowwise = stage.model_copy(update={"precision": "fp8_rowwise", "recompute": recompute})
    lines = [
        line
        for line in rank_flops(rowwise, 1)
        if (line.place, line.part) == ("decoder.20", Part.ROUTED_EXPERTS)
    ]
    product = 2 * 4096 * 8 * 3 * 7168 * 2048
    assert {
        line.kernel: (line.forward_flops, line.dgrad_flops, line.wgrad_flops, line.recompute_flops)
        for line in lines
    } == {
        Kernel.GROUPED_FP8: (product, product, 0, product),
        Kernel.GROUPED: (0, 0, product, 0),
    }


def test_fused_attention_computes_the_scores_again_backward(stage: Recipe) -> None:
    (core,) = (
        line
        for line in rank_flops(stage, 1)
        if line.place == "decoder.20" and line.kernel is Kernel.ATTENTION
    )
    assert core.dgrad_flops * (192 + 128) == core.forward_flops * (3 * 192 + 2 * 128)
    assert (core.wgrad_flops, core.recompute_flops) == (0, 0)


def test_torch_pads_values_to_the_width_of_keys(stage: Recipe) -> None:
    native = stage.model_copy(update={"kernels": KernelSpec(family="torch_native")})
    ratio = forward_by_kernel(native, 2)[Kernel.ATTENTION] / forward_by_kernel(stage, 2)[Kernel.ATTENTION]
    assert ratio == pytest.approx((192 + 192) / (192 + 128))


@pytest.mark.parametrize(
    ("recompute", "parts"),
    [
        (Recompute(), set()),
        (Recompute(granularity="selective", modules=("mla_up_proj",)), {Part.ATTENTION}),
        (Recompute(granularity="selective", modules=("core_attn",)), {"core_attention"}),
        (Recompute(granularity="selective", modules=("shared_experts",)), {Part.SHARED_EXPERTS}),
        (
            Recompute(granularity="selective", modules=("moe",)),
            {Part.ROUTER, Part.ROUTED_EXPERTS, Part.SHARED_EXPERTS},
        ),
        (Recompute(granularity="selective", modules=("layernorm", "moe_act")), set()),
    ],
)
def test_recomputation_repeats_what_its_modules_contain(
    stage: Recipe, recompute: Recompute, parts: set[str]
) -> None:
    lines = rank_flops(stage.model_copy(update={"recompute": recompute}), 1)
    assert {line.part for line in lines if line.recompute_flops} == parts


def test_full_recomputation_repeats_the_whole_forward_pass_but_the_head(stage: Recipe) -> None:
    full = Recompute(granularity="full", method="uniform", num_layers=1)
    for line in rank_flops(stage.model_copy(update={"recompute": full}), 3):
        assert line.recompute_flops == (0 if line.place == "output_layer" else line.forward_flops)


@pytest.mark.parametrize("name", SHIPPED)
def test_all_ranks_together_do_what_the_model_needs(loader: Loader, name: str) -> None:
    recipe = loader.recipe(recipes_root() / f"{name}.yaml")
    ranks_per_stage = recipe.parallel.num_gpus // recipe.parallel.pipeline
    spent = Counter[str]()
    for pipeline_rank in range(recipe.parallel.pipeline):
        for line in rank_flops(recipe, pipeline_rank):
            spent[line.part] += ranks_per_stage * line.forward_flops
    routers = spent.pop(Part.ROUTER)
    for beside in (EXPERT_BIAS, EXPERT_MIXING):
        spent.pop(beside, None)
    needed = dict(
        forward_flops_by_part(
            recipe.model,
            num_seqs=recipe.global_batch_size,
            seq_len=recipe.seq_len,
            num_mtp_layers=recipe.num_mtp_layers,
            counting=FlopsCounting.MCORE_WINDOWED,
        )
    )
    needed.pop(Part.NORMS, None)  # counted by Megatron-Core as if they were products
    assert spent == needed
    assert routers > 0


@pytest.mark.parametrize(
    ("key", "parallel", "num_mtp_layers"),
    [
        ("nemotron_3_super_120b_a12b", ParallelSpec(num_gpus=64, expert=64), 2),
        (
            "nemotron_3_super_120b_a12b",
            ParallelSpec(num_gpus=16, tensor=2, sequence_parallel=True, expert=8),
            0,
        ),
        ("nemotron_h_56b", ParallelSpec(num_gpus=32, tensor=8), 0),
        ("qwen3_next_80b_a3b", ParallelSpec(num_gpus=64, pipeline=2, expert=8), 1),
        ("llama_4_maverick_17b_128e", ParallelSpec(num_gpus=128, pipeline=4, expert=16), 0),
        ("gpt_3_175b", ParallelSpec(num_gpus=96, tensor=4, pipeline=8), 0),
        ("deepseek_v4_flash", ParallelSpec(num_gpus=128, expert=64), 1),
        ("glm_5_2", ParallelSpec(num_gpus=192, pipeline=6, expert=32), 1),
    ],
)
def test_all_ranks_of_a_reference_model_do_what_it_needs(
    loader: Loader, make_recipe: RecipeMaker, key: str, parallel: ParallelSpec, num_mtp_layers: int
) -> None:
    recipe = make_recipe(loader.model(key), parallel, num_mtp_layers=num_mtp_layers, seq_len=8192)
    spent = Counter[str]()
    for pipeline_rank in range(parallel.pipeline):
        for line in rank_flops(recipe, pipeline_rank):
            spent[line.part] += parallel.num_gpus // parallel.pipeline * line.forward_flops
    needed = forward_flops_by_part(
        recipe.model,
        num_seqs=recipe.global_batch_size,
        seq_len=8192,
        num_mtp_layers=num_mtp_layers,
        counting=FlopsCounting.MCORE_WINDOWED,
    )
    for uncounted in (Part.ROUTER, Part.NORMS, Part.MTP_PROJECTION, Part.RESIDUAL_STREAMS):
        spent.pop(uncounted, 0)
    assert spent == {part: flops for part, flops in needed.items() if part in spent}
    assert set(needed) - set(spent) <= {Part.NORMS, Part.MTP_PROJECTION}


def test_a_state_costs_twice_as_much_backward_and_has_no_weights(
    loader: Loader, make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(loader.model("nemotron_3_nano_30b_a3b"), ParallelSpec(num_gpus=8, expert=8))
    (line,) = (
        one for one in rank_flops(recipe, 0) if one.place == "decoder.0" and one.kernel is Kernel.STATE
    )
    assert line.forward_flops == 16 * 7 * 4096 * 4096 * 128  # 16 micro batches of 4096 tokens
    assert (line.dgrad_flops, line.wgrad_flops) == (2 * line.forward_flops, 0)


def test_latent_experts_are_dispatched_and_multiplied_in_their_own_width(
    loader: Loader, make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(
        loader.model("nemotron_3_super_120b_a12b"), ParallelSpec(num_gpus=8, expert=8), global_batch_size=8
    )
    flops = {line.part: line.forward_flops for line in rank_flops(recipe, 0) if line.place == "decoder.1"}
    assert flops[Part.ROUTED_EXPERTS] == 2 * 2 * 4096 * 22 * 1024 * 2688
    assert flops[Part.LATENT_PROJECTIONS] == 2 * 4096 * 2 * 4096 * 1024
