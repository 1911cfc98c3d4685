"""The operations that a recipe is lowered to do the work that the accounting counts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from moe_bench.analysis.collectives import Group, Phase
from moe_bench.analysis.comms import step_transfers
from moe_bench.analysis.rank_flops import rank_flops
from moe_bench.errors import BadInputError
from moe_bench.projection.rows.inference import InferredRun, infer, load_catalogue
from moe_bench.projection.work.lowering import lower
from moe_bench.projection.work.operations import (
    AttentionCore,
    Gemm,
    LayerWork,
    MemoryBound,
    Number,
    Part,
    Pass,
)
from moe_bench.projection.work.traits import Traits
from moe_bench.results.published import PublishedRow, load_rows
from moe_bench.spec.catalogue import data_root, find_recipe, recipe_paths, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

LOADER = Loader(root=recipes_root(), rules=())
CATALOGUE = load_catalogue(recipes_root())
ALL = tuple(f"{path.parent.name}/{path.stem}" for path in recipe_paths(recipes_root()))


def recipe_named(name: str, *changes: str) -> Recipe:
    return LOADER.recipe(find_recipe(name, LOADER), changes=changes)


def flops_of_rank(recipe: Recipe, pipeline_rank: int) -> dict[Pass, float]:
    """FLOPs of all lowered products and attention cores of one rank over a step, by pass."""
    lowered = lower(recipe)
    totals = dict.fromkeys(Pass, 0.0)
    for chunk in lowered.chunks:
        if chunk.pipeline_rank != pipeline_rank:
            continue
        works = [(lowered.kinds[kind], number) for kind, number in chunk.layers.items()]
        works += [(lowered.loss, 1)] if chunk.has_loss else []
        for work, number in works:
            for operation in work.operations:
                if not isinstance(operation, MemoryBound):
                    totals[operation.in_pass] += number * recipe.num_micro_batches * operation.num_flops
    return totals


@pytest.mark.parametrize("name", ALL)
def test_every_product_of_the_accounting_is_priced_in_its_pass(name: str) -> None:
    recipe = recipe_named(name)
    for pipeline_rank in {0, recipe.parallel.pipeline // 2, recipe.parallel.pipeline - 1}:
        counted = rank_flops(recipe, pipeline_rank)
        lowered = flops_of_rank(recipe, pipeline_rank)
        expected = {
            Pass.FORWARD: sum(line.forward_flops for line in counted),
            Pass.DGRAD: sum(line.dgrad_flops for line in counted),
            Pass.WGRAD: sum(line.wgrad_flops for line in counted),
            Pass.RECOMPUTE: sum(line.recompute_flops for line in counted),
        }
        for in_pass, flops in expected.items():
            assert lowered[in_pass] == pytest.approx(flops, rel=1e-6), (pipeline_rank, in_pass)


def test_messages_carry_the_bytes_that_the_accounting_counts() -> None:
    recipe = recipe_named("deepseek_v3/h100_sxm_1024g_fp8_blockwise")
    lowered = lower(recipe)
    for pipeline_rank in range(recipe.parallel.pipeline):
        counted = sum(
            transfer.num_bytes
            for transfer in step_transfers(recipe, pipeline_rank)
            if transfer.place.startswith(("decoder", "mtp")) and transfer.phase is not Phase.PIPELINE
        )
        carried = sum(
            number * message.num_bytes
            for chunk in lowered.chunks
            if chunk.pipeline_rank == pipeline_rank
            for kind, number in chunk.layers.items()
            for message in lowered.kinds[kind].messages
            if message.group is not Group.CONTEXT
        )
        assert carried * recipe.num_micro_batches == pytest.approx(counted, rel=0.02)


def of(recipe: Recipe, kind: type, part: Part | None = None) -> Iterator[Gemm | MemoryBound | AttentionCore]:
    for work in lower(recipe).kinds.values():
        for operation in work.operations:
            if isinstance(operation, kind) and (part is None or getattr(operation, "part", None) is part):
                yield operation


def test_experts_are_products_of_local_experts_with_their_tokens() -> None:
    recipe = recipe_named("qwen3_30b_a3b/h100_sxm_16g_bf16")
    first = next(iter(of(recipe, Gemm, Part.EXPERTS)))
    assert isinstance(first, Gemm)
    local = 128 // recipe.parallel.expert
    tokens = recipe.seq_len * recipe.micro_batch_size * 8 / local
    assert (first.num_groups, first.num_rows, first.num_inner, first.num_columns) == (
        local,
        tokens,
        2048,
        2 * 768,
    )


def test_full_recompute_runs_every_forward_operation_of_a_layer_again() -> None:
    recipe = recipe_named(
        "qwen3_30b_a3b/h100_sxm_16g_bf16", "recompute.granularity=full", "recompute.num_layers=1"
    )
    work = next(iter(lower(recipe).kinds.values()))
    forward = [operation for operation in work.operations if operation.in_pass is Pass.FORWARD]
    again = [operation for operation in work.operations if operation.in_pass is Pass.RECOMPUTE]
    assert len(forward) == len(again) > 0


@pytest.mark.parametrize("is_sharded", [False, True])
def test_scales_per_row_cost_two_products_in_fp8_and_their_tokens_quantized(is_sharded: bool) -> None:
    """Weights once per step, which is left out; where Megatron-FSDP gathers them, every time."""
    sharding = "megatron_fsdp" if is_sharded else "distributed_optimizer"
    recipe = recipe_named("mixtral_8x7b/h100_sxm_64g_fp8_rowwise")
    parallel = recipe.parallel.model_copy(update={"data_sharding": sharding})
    lowered = lower(recipe.model_copy(update={"parallel": parallel}))
    (work,) = lowered.kinds.values()
    products = {
        (operation.in_pass, operation.number)
        for operation in work.operations
        if isinstance(operation, Gemm) and operation.part is Part.EXPERTS
    }
    assert products == {
        (Pass.FORWARD, Number.FP8_TENSORWISE), (Pass.DGRAD, Number.FP8_TENSORWISE), (Pass.WGRAD, Number.BF16)
    }  # fmt: skip
    # one expert per rank; 8,192 rows of 4,096 channels, 2 x 14,336 of gate and linear part, 14,336 activated
    up, down, rows = 4096 * 28_672, 14_336 * 4096, 8192
    moved = {Pass.FORWARD: 0.0, Pass.DGRAD: 0.0}
    for operation in work.operations:
        if isinstance(operation, MemoryBound) and operation.part is Part.QUANTIZATION:
            moved[operation.in_pass] += operation.num_bytes
    assert moved == {
        Pass.FORWARD: 3 * rows * (4096 + 14_336) + 3 * (up + down) * is_sharded,
        Pass.DGRAD: 3 * rows * (28_672 + 4096) + 5 * (up + down) * is_sharded,
    }


def test_selective_recompute_of_the_activation_moves_its_bytes_again_and_multiplies_nothing() -> None:
    recipe = recipe_named(
        "qwen3_30b_a3b/h100_sxm_16g_bf16", "recompute.granularity=selective", "recompute.modules=[moe_act]"
    )
    again = [
        operation
        for work in lower(recipe).kinds.values()
        for operation in work.operations
        if operation.in_pass is Pass.RECOMPUTE
    ]
    assert again
    assert all(isinstance(operation, MemoryBound) and operation.part is Part.EXPERTS for operation in again)


def test_a_loaded_rank_multiplies_that_many_more_rows() -> None:
    recipe = recipe_named("qwen3_30b_a3b/h100_sxm_16g_bf16")

    def expert_flops(load: float) -> float:
        return sum(
            operation.num_flops
            for work in lower(recipe, load=load).kinds.values()
            for operation in work.operations
            if isinstance(operation, Gemm) and operation.part is Part.EXPERTS
        )

    assert expert_flops(1.5) == pytest.approx(1.5 * expert_flops(1.0))


def test_a_graph_of_the_whole_step_leaves_the_host_nothing_to_launch() -> None:
    eager = recipe_named("qwen3_30b_a3b/h100_sxm_16g_bf16", "cuda_graphs.implementation=none")
    graphed = eager.model_copy(
        update={"cuda_graphs": eager.cuda_graphs.model_copy(update={"implementation": "full_iteration"})}
    )
    assert all(work.num_launches > 100 for work in lower(eager).kinds.values())
    assert all(work.num_launches == 0 for work in lower(graphed).kinds.values())


def test_fp32_is_refused_with_the_precisions_that_have_rates() -> None:
    recipe = recipe_named("qwen3_30b_a3b/h100_sxm_16g_bf16").model_copy(update={"precision": "fp32"})
    with pytest.raises(BadInputError, match="precision fp32 is not projected"):
        lower(recipe)


SPARSE = [
    row
    for row in load_rows(data_root() / "results" / "published")
    if row.is_training and row.model in ("DeepSeek-V4-Flash", "GLM-5.2")
]


@pytest.mark.parametrize("row", SPARSE, ids=lambda row: row.id)
def test_sparse_attention_does_the_work_that_the_accounting_counts(row: PublishedRow) -> None:
    run = infer(row, CATALOGUE)
    assert isinstance(run, InferredRun)
    last = run.recipe.parallel.pipeline - 1
    lowered, counted = flops_of_rank(run.recipe, last), rank_flops(run.recipe, last)
    assert lowered[Pass.FORWARD] == pytest.approx(sum(line.forward_flops for line in counted), rel=1e-6)
    assert lowered[Pass.DGRAD] == pytest.approx(sum(line.dgrad_flops for line in counted), rel=1e-6)
    assert lowered[Pass.WGRAD] == pytest.approx(sum(line.wgrad_flops for line in counted), rel=1e-6)


def test_residual_streams_are_mixed_once_per_half_layer() -> None:
    run = infer(SPARSE[0], CATALOGUE)
    assert isinstance(run, InferredRun)
    streams, rows, hidden = 4, 4096, 4096
    work = next(iter(lower(run.recipe).kinds.values()))
    moved = [
        one.num_bytes for one in work.operations if isinstance(one, MemoryBound) and one.part is Part.NORMS
    ]
    assert moved.count((3 * streams + 2) * 2 * rows * hidden) == 2


def test_unfused_attention_works_on_the_whole_score_matrix() -> None:
    recipe = recipe_named("deepseek_v3/h100_sxm_1024g_bf16")
    fused, unfused = (
        lower(recipe, traits=Traits(fuses_attention=fuses)).kinds.values() for fuses in (True, False)
    )

    def core_flops(works: Iterable[LayerWork]) -> float:
        return sum(
            one.num_flops
            for work in works
            for one in work.operations
            if isinstance(one, Gemm | AttentionCore)
            and one.in_pass is Pass.FORWARD
            and (isinstance(one, AttentionCore) or one.part is Part.ATTENTION)
        )

    twice_causal = 2 * recipe.seq_len / (recipe.seq_len + 1)
    assert core_flops(unfused) == pytest.approx(twice_causal * core_flops(fused), rel=1e-3)


def test_a_bf16_gradient_is_half_the_traffic_of_an_fp32_one() -> None:
    products = {
        dtype: next(
            one
            for work in lower(
                recipe_named("qwen3_30b_a3b", f"optimizer.gradient_dtype={dtype}")
            ).kinds.values()
            for one in work.operations
            if isinstance(one, Gemm) and one.in_pass is Pass.WGRAD
        )
        for dtype in ("bf16", "fp32")
    }
    elements = products["bf16"].num_rows * products["bf16"].num_columns * products["bf16"].num_groups
    assert products["fp32"].num_bytes - products["bf16"].num_bytes == pytest.approx(4 * elements)


def test_collectives_and_recomputed_modules_cost_the_host_time() -> None:
    plain = recipe_named("moonlight_16b_a3b/h100_sxm_8g_bf16_gbs4")
    recomputed = recipe_named(
        "moonlight_16b_a3b/h100_sxm_8g_bf16_gbs4",
        "recompute.granularity=selective",
        "recompute.modules=[mla_up_proj,moe_act]",
    )
    alone = recipe_named("moonlight_16b_a3b/h100_sxm_8g_bf16_gbs4", "parallel.tensor=1")
    pieced = recipe_named("moonlight_16b_a3b/h100_sxm_8g_bf16_gbs4", "overlap.tensor_parallel=true")

    def launches(recipe: Recipe) -> float:
        return max(work.num_launches for work in lower(recipe).kinds.values())

    assert launches(recomputed) >= launches(plain) + 2 * 12  # collectives that are repeated come on top
    assert launches(plain) > launches(pieced) > launches(alone)


def test_a_graph_of_a_part_saves_its_launches_and_costs_its_replay() -> None:
    """40 kernels of the router and 20 of preprocessing for a replay that costs the host as much as 30."""
    parts = "cuda_graphs.modules=[moe_router,moe_preprocess]"
    name = "qwen3_30b_a3b/h100_sxm_16g_bf16"
    (eager,) = lower(
        recipe_named(name, "cuda_graphs.implementation=none", "cuda_graphs.modules=[]")
    ).kinds.values()
    graphed_recipe = recipe_named(name, "cuda_graphs.implementation=transformer_engine", parts)
    (graphed,) = lower(graphed_recipe).kinds.values()
    assert eager.num_launches - graphed.num_launches == 40 + 20 - 30


def test_parts_that_stay_in_bf16_are_multiplied_so_and_not_quantized() -> None:
    recipe = recipe_named("qwen3_30b_a3b/h100_sxm_16g_bf16").model_copy(
        update={"precision": "fp8_tensorwise"}
    )
    whole, (kept,) = (
        tuple(lower(recipe, traits=traits).kinds.values())
        for traits in (Traits(), Traits(bf16_parts=frozenset({Part.ATTENTION_PROJECTIONS})))
    )
    assert forms(whole[0], Part.ATTENTION_PROJECTIONS) == {Number.FP8_TENSORWISE}
    assert forms(kept, Part.ATTENTION_PROJECTIONS) == {Number.BF16}
    assert forms(kept, Part.EXPERTS) == {Number.FP8_TENSORWISE}
    assert len(kept.operations) < len(whole[0].operations)


def forms(work: LayerWork, part: Part) -> set[Number]:
    return {one.number for one in work.operations if isinstance(one, Gemm) and one.part is part}
