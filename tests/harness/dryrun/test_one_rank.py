"""A rank without data holds, computes and sends what the closed forms and hand counts say."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from torch import Tensor

from moe_bench.analysis.comms import step_transfers
from moe_bench.analysis.flops import FlopsCounting, forward_flops_by_part, router_flops
from moe_bench.analysis.memory import rank_memory
from moe_bench.analysis.params import rank_params
from moe_bench.harness.dryrun.accounting import BLOCK_BYTES
from moe_bench.harness.dryrun.one_rank import dry_run_rank
from moe_bench.harness.dryrun.outcome import RankDryRun
from moe_bench.harness.kernels import grouped_linear
from moe_bench.spec.catalogue import find_recipe
from moe_bench.spec.derive_dryrun import dryrun_plan
from moe_bench.spec.recipe import (
    Dispatcher,
    DispatchSpec,
    Fusions,
    KernelFamily,
    KernelSpec,
    OptimizerSpec,
    Overlap,
    Recipe,
    Recompute,
)
from tests.harness.dryrun.conftest import LOADER, NUM_LAYERS, SEQ_LEN, first_rank, toy

TP2 = {"tensor": 2, "sequence_parallel": True}
FULL = Recompute(granularity="full", num_layers=1)
OVERLAPPED = Overlap(grad_reduce=True, param_gather=True)
MTP_ALONE = {"num_gpus": 3, "pipeline": 3, "virtual_pipeline": 2, "layout": "Et|t|t||tm|L"}

LAYOUTS: Mapping[str, Recipe] = {
    "one rank": toy("qwen3_30b_a3b"),
    "TP2 x EP4": toy("qwen3_30b_a3b", parallel={"num_gpus": 4, "expert": 4, **TP2}),
    "latent attention, TP2 x PP2 x EP2, MTP": toy(
        "deepseek_v3", parallel={"num_gpus": 8, "pipeline": 2, "expert": 2, **TP2}, num_mtp_layers=1
    ),
    "PP3 x VPP2 by a layout, MTP apart from the loss": toy(
        "deepseek_v3", parallel=MTP_ALONE, num_mtp_layers=1, num_micro_batches=12, overlap=Overlap(p2p=True)
    ),
    "windows and sinks, PP4 x EP8": toy(
        "gpt_oss_20b", parallel={"num_gpus": 32, "pipeline": 4, "expert": 8}, overlap=OVERLAPPED
    ),
    "CP2 x TP2 x EP4": toy(
        "qwen3_30b_a3b",
        parallel={"num_gpus": 8, "context": 2, "context_comm": "allgather", "expert": 4, **TP2},
    ),
    "ETP2 x EP2": toy("mixtral_8x7b", parallel={"num_gpus": 4, "expert": 2, "expert_tensor": 2, **TP2}),
    "full recompute, overlapped reduction, DP4": toy(
        "deepseek_v3", parallel={"num_gpus": 4, "expert": 4}, recompute=FULL, overlap=OVERLAPPED
    ),
    "selective recompute, TP2": toy(
        "deepseek_v3",
        parallel={"num_gpus": 2, "expert": 2, **TP2},
        recompute=Recompute(
            granularity="selective", modules=("mla_up_proj", "layernorm", "moe_act", "moe", "mlp")
        ),
    ),
    "expert-parallel overlap, EP4": toy(
        "qwen3_30b_a3b",
        parallel={"num_gpus": 4, "expert": 4},
        overlap=OVERLAPPED.model_copy(update={"expert_parallel": True}),
    ),
}
STAGES = [(name, stage) for name, recipe in LAYOUTS.items() for stage in range(recipe.parallel.pipeline)]


@pytest.fixture(scope="module")
def runs() -> dict[tuple[str, int], RankDryRun]:
    """One rank of every stage of every layout."""
    return {(name, stage): first_rank(LAYOUTS[name], stage) for name, stage in STAGES}


def flops(run: RankDryRun, phase: str) -> Counter[str]:
    counted: Counter[str] = Counter()
    for line in run.flops:
        if line.phase == phase:
            counted[line.kind] += line.num_flops
    return counted


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_parameters_are_the_counted_ones(
    runs: dict[tuple[str, int], RankDryRun], name: str, stage: int
) -> None:
    counted = rank_params(LAYOUTS[name], stage)
    run = runs[name, stage]
    assert (run.num_dense_params, run.num_expert_params) == (counted.dense, counted.expert)


@pytest.mark.parametrize(("name", "stage"), STAGES)
def test_every_collective_carries_the_counted_bytes(
    runs: dict[tuple[str, int], RankDryRun], name: str, stage: int
) -> None:
    found: Counter[tuple[str, ...]] = Counter()
    for line in runs[name, stage].traffic:
        # the optimizer exchanges scalars, which the closed form leaves out; the loss is no module
        if line.phase != "optimizer":
            place = (
                "output_layer"
                if line.layer == "-" and line.group == "TP" and line.phase == "forward"
                else line.layer
            )
            found[line.op, line.group, line.phase, place] += line.num_bytes
    expected: Counter[tuple[str, ...]] = Counter()
    for transfer in step_transfers(LAYOUTS[name], stage):
        expected[transfer.op, transfer.group, transfer.phase, transfer.place] += transfer.num_bytes
    assert found == expected


def test_states_of_a_shipped_recipe_are_the_counted_bytes() -> None:
    asked = LOADER.recipe(find_recipe("moonlight_16b_a3b/h100_sxm_8g_bf16_gbs4", LOADER))
    recipe = dryrun_plan(asked, modified=()).recipe
    run, closed = dry_run_rank(recipe, 3), rank_memory(recipe, 0)
    held = run.peak.bytes_by_category
    # the buffers are padded to whole shards and 64 elements per weight (param_and_grad_buffer.py)
    assert held["weights"] == pytest.approx(closed.weights_bytes, rel=1e-4)
    assert held["gradients"] == pytest.approx(closed.gradients_bytes, rel=1e-4)
    assert held["optimizer states"] == pytest.approx(closed.optimizer_bytes, rel=1e-4)
    assert sum(held.values()) == run.peak.num_bytes


def forward_by_closed_form(recipe: Recipe, *, num_seqs: int) -> int:
    """Products of a whole forward pass: attention by half, and the router, which Automodel leaves out."""
    parts = forward_flops_by_part(
        recipe.model, num_seqs=num_seqs, seq_len=SEQ_LEN, num_mtp_layers=0, counting=FlopsCounting.AUTOMODEL
    )
    assert recipe.model.moe is not None
    num_moe = recipe.model.num_layers - recipe.model.num_dense_layers
    router = router_flops(
        tokens=num_seqs * SEQ_LEN, hidden=recipe.model.hidden_size, num_experts=recipe.model.moe.num_experts
    )
    return sum(parts.values()) + num_moe * router


def test_forward_operations_are_the_counted_ones(runs: dict[tuple[str, int], RankDryRun]) -> None:
    recipe = LAYOUTS["one rank"]
    found = flops(runs["one rank", 0], "forward")
    assert found.total() == forward_by_closed_form(recipe, num_seqs=recipe.num_micro_batches)
    moe = recipe.model.moe
    assert moe is not None
    rows = recipe.num_micro_batches * SEQ_LEN * moe.top_k
    # gate, up and down projection
    assert found["grouped GEMM"] == (
        NUM_LAYERS * 2 * rows * recipe.model.hidden_size * moe.expert_ffn_hidden_size * 3
    )


def test_the_backward_pass_has_two_products_for_one_and_attention_five_for_two(
    runs: dict[tuple[str, int], RankDryRun],
) -> None:
    forward, backward = (flops(runs["one rank", 0], phase) for phase in ("forward", "backward"))
    assert backward["mm"] == 2 * forward["mm"]
    assert backward["grouped GEMM"] == 2 * forward["grouped GEMM"]
    assert 2 * backward["attention"] == 5 * forward["attention"]
    assert flops(runs["one rank", 0], "recompute").total() == 0


def test_recomputation_repeats_the_layers_and_nothing_else(
    runs: dict[tuple[str, int], RankDryRun],
) -> None:
    run = runs["full recompute, overlapped reduction, DP4", 0]
    by_layer: dict[str, Counter[str]] = {"forward": Counter(), "recompute": Counter()}
    for line in run.flops:
        if line.phase in by_layer:
            by_layer[line.phase][line.layer] += line.num_flops
    del by_layer["forward"]["output_layer"]
    assert by_layer["recompute"] == by_layer["forward"]
    assert set(by_layer["forward"]) == {f"decoder.{layer}" for layer in range(NUM_LAYERS)}


@pytest.mark.parametrize("stage", [0, 3])
def test_windows_lower_the_operations_of_attention(
    runs: dict[tuple[str, int], RankDryRun], stage: int
) -> None:
    recipe = LAYOUTS["windows and sinks, PP4 x EP8"]
    # layers 0 and 2 see 16 of 64 tokens, layers 1 and 3 all: one layer stands on each stage
    attention = recipe.model.attention
    assert attention.kind == "gqa"
    pairs = SEQ_LEN * 16 - 16 * 15 // 2 if stage == 0 else SEQ_LEN**2 // 2
    per_pair = 2 * attention.num_heads * 2 * attention.head_dim
    expected = recipe.num_micro_batches * per_pair * pairs
    run = runs["windows and sinks, PP4 x EP8", stage]
    assert flops(run, "forward")["attention"] == expected


REPEATED: Mapping[str, Recipe] = {
    "no pipeline": toy("qwen3_30b_a3b", parallel={"num_gpus": 2, "expert": 2}, num_micro_batches=6),
    "full recompute": toy("qwen3_30b_a3b", parallel={"num_gpus": 2}, num_micro_batches=6, recompute=FULL),
    "expert-parallel overlap": toy(
        "qwen3_30b_a3b",
        parallel={"num_gpus": 4, "expert": 4},
        num_micro_batches=6,
        overlap=OVERLAPPED.model_copy(update={"expert_parallel": True}),
    ),
    "1F1B": toy("deepseek_v3", parallel={"num_gpus": 4, "pipeline": 4, "layout": None}, num_micro_batches=9),
    "interleaved": toy(
        "qwen3_30b_a3b",
        parallel={"num_gpus": 4, "pipeline": 2, "virtual_pipeline": 2},
        num_micro_batches=12,
        overlap=Overlap(p2p=True),
    ),
    "interleaved, full recompute, three stages": toy(
        "qwen3_30b_a3b",
        parallel={"num_gpus": 6, "pipeline": 3, "virtual_pipeline": 2, "layout": "Et|t|t||tt|L"},
        num_micro_batches=15,
        recompute=FULL,
        num_layers=5,
    ),
    **{
        f"Megatron-FSDP, {strategy}": toy(
            "qwen3_30b_a3b",
            parallel={
                "num_gpus": 4,
                "expert": 2,
                "data_sharding": "megatron_fsdp",
                "fsdp_strategy": strategy,
            },
            num_micro_batches=6,
            overlap=OVERLAPPED,
        )
        for strategy in ("optim", "optim_grads", "optim_grads_params")
    },
    "Megatron-FSDP, full recompute": toy(
        "qwen3_30b_a3b",
        parallel={"num_gpus": 2, "data_sharding": "megatron_fsdp"},
        num_micro_batches=6,
        overlap=OVERLAPPED,
        recompute=FULL,
    ),
}


@pytest.mark.parametrize("name", REPEATED)
def test_few_micro_batches_show_the_whole_step(name: str) -> None:
    recipe = REPEATED[name]
    for stage in range(recipe.parallel.pipeline):
        few = first_rank(recipe, stage)
        full = first_rank(recipe, stage, num_micro_batches=recipe.num_micro_batches)
        assert few.num_micro_batches_run < full.num_micro_batches_run == recipe.num_micro_batches
        # each micro batch left out would have left its loss, one block, on the last rank
        num_left_out = full.num_micro_batches_run - few.num_micro_batches_run
        assert 0 <= full.peak.num_bytes - few.peak.num_bytes <= num_left_out * BLOCK_BYTES
        assert full.peak.num_bytes == few.peak.num_bytes or stage == recipe.parallel.pipeline - 1
        assert (few.peak.phase, few.peak.module) == (full.peak.phase, full.peak.module)
        assert few.flops == full.flops
        assert few.traffic == full.traffic


def test_megatron_fsdp_holds_a_share_and_gathers_again_for_every_micro_batch() -> None:
    layout = {"num_gpus": 4, "data_sharding": "megatron_fsdp"}
    recipe = toy("qwen3_30b_a3b", parallel=layout, num_micro_batches=7, overlap=OVERLAPPED)
    run = first_rank(recipe, 0)
    assert run.num_micro_batches_run == 3
    assert (run.num_dense_params, run.num_expert_params) == (
        rank_params(recipe, 0).dense,
        rank_params(recipe, 0).expert,
    )
    calls: Counter[tuple[str, str]] = Counter()
    for line in run.traffic:
        if line.group == "EDP":
            calls[line.op, line.phase] += line.num_calls
    # expert weights of every layer for both passes of every micro batch, gradients after each
    assert calls["all_gather", "parameter sync"] == 7 * 2 * NUM_LAYERS
    assert calls["reduce_scatter", "gradient sync"] == 7 * NUM_LAYERS
    # which is how it is meant, not a finding
    assert not [finding for finding in run.findings if finding.kind == "repeated gather"]


def test_the_experts_of_megatron_fsdp_are_multiplied_where_they_are_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copies = []
    stacked = grouped_linear.stacked

    def watched(weights: Sequence[Tensor]) -> Tensor:
        whole = stacked(weights)
        copies.append(whole.untyped_storage()._cdata != weights[0].untyped_storage()._cdata)
        return whole

    monkeypatch.setattr(grouped_linear, "stacked", watched)
    layout = {"num_gpus": 4, "expert": 2, "data_sharding": "megatron_fsdp"}
    first_rank(toy("gpt_oss_20b", parallel=layout, overlap=OVERLAPPED, optimizer=OptimizerSpec()), 0)
    assert copies
    assert not any(copies)


def test_megatron_fsdp_keeps_the_counted_states() -> None:
    layout = {"num_gpus": 4, "expert": 2, "data_sharding": "megatron_fsdp"}
    recipe = toy("qwen3_30b_a3b", parallel=layout, overlap=OVERLAPPED)
    held, closed = first_rank(recipe, 0).peak.bytes_by_category, rank_memory(recipe, 0)
    # small weights are padded to whole rows on every rank
    assert held["weights"] == pytest.approx(closed.weights_bytes, rel=0.05)
    assert held["gradients"] == pytest.approx(closed.gradients_bytes, rel=0.05)
    assert held["optimizer states"] == pytest.approx(closed.optimizer_bytes, rel=0.05)


def test_memory_held_past_its_use_is_found() -> None:
    """With full recompute the dispatcher's probabilities hold each expert layer's graph; ours hold none."""
    small = toy("deepseek_v3", recompute=FULL, num_micro_batches=2)
    fused = small.model_copy(update={"seq_len": 32_768})
    assert not [finding for finding in first_rank(fused, 0).findings if ".probs" in finding.what]
    apart = fused.kernels.fusions.model_copy(update={"permute": False})
    recipe = fused.model_copy(update={"kernels": fused.kernels.model_copy(update={"fusions": apart})})
    held = [finding for finding in first_rank(recipe, 0).findings if finding.kind == "held past use"]
    probs = next(finding for finding in held if "MoEAlltoAllTokenDispatcher.probs" in finding.what)
    # layer 0 is dense
    assert probs.where == ("decoder.1", "decoder.2", "decoder.3")
    vector_bytes = 32_768 * recipe.model.hidden_size * 2
    # the layer's input and its gradient, besides scores and masks of the router
    assert probs.num_bytes > 3 * 2 * vector_bytes


@pytest.mark.parametrize("family", ["torch_native", "quack"])
def test_adding_weight_gradients_in_the_product_moves_no_byte_of_the_peak_and_no_operation(
    family: KernelFamily,
) -> None:
    """A placeholder goes to autograd where a gradient did (harness/kernels/grouped_linear.py)."""
    layout = {"num_gpus": 4, "expert": 2}
    separate, added = (
        toy(
            "qwen3_30b_a3b",
            parallel=layout,
            kernels=KernelSpec(
                family=family,
                fusions=Fusions(permute=True, router=True, activation=True, gradient_accumulation=is_added),
            ),
        )
        for is_added in (False, True)
    )
    assert added.kernels.fusions.gradient_accumulation
    assert rank_memory(added, 0) == rank_memory(separate, 0)
    runs = first_rank(separate, 0), first_rank(added, 0)
    assert runs[0].peak.num_bytes == runs[1].peak.num_bytes
    assert runs[0].flops == runs[1].flops


def test_weights_are_gathered_twice_where_the_gather_is_not_overlapped() -> None:
    layout: dict[str, Any] = {"parallel": {"num_gpus": 8, "expert": 4}}
    twice = first_rank(toy("qwen3_30b_a3b", **layout), 0).findings
    repeated = [finding for finding in twice if finding.kind == "repeated gather"]
    assert {finding.where for finding in repeated} == {("DPxCP",), ("EDP",)}
    assert {finding.what for finding in repeated} == {"updated weights are gathered 2 times per step"}
    once = first_rank(toy("qwen3_30b_a3b", overlap=OVERLAPPED, **layout), 0).findings
    assert not [finding for finding in once if finding.kind == "repeated gather"]


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_a_routing_matrix_gives_this_rank_its_share_of_the_tokens(dispatcher: Dispatcher) -> None:
    recipe = toy(
        "qwen3_30b_a3b",
        parallel={"num_gpus": 4, "expert": 4},
        dispatch=DispatchSpec(dispatcher=dispatcher),
    )
    # 8 experts, two on each rank; every sender's 64 tokens make 128 choices
    even = dry_run_rank(recipe, 0)
    skewed = ((32, 32, 16, 16, 8, 8, 8, 8),) * 4
    busy, idle = (dry_run_rank(recipe, rank, counts=skewed) for rank in (0, 3))
    products = {
        name: flops(run, "forward")["grouped GEMM"]
        for name, run in {"even": even, "busy": busy, "idle": idle}.items()
    }
    assert products["busy"] * 128 == products["even"] * 256  # receives 4 x 64 rows instead of 4 x 32
    assert products["idle"] * 128 == products["even"] * 64
    assert busy.peak.num_bytes > even.peak.num_bytes > idle.peak.num_bytes


def test_the_timeline_ends_where_the_peak_was_reached(runs: dict[tuple[str, int], RankDryRun]) -> None:
    for run in runs.values():
        assert max(run.timeline_bytes) <= run.peak.num_bytes
        assert max(run.peak.bytes_by_phase.values()) == run.peak.num_bytes
