"""Rules on rows made by hand: what each suite and release leaves open, and what is made of it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from moe_bench.projection.rows.inference import InferredRun
from moe_bench.projection.rows.rules import RULES
from moe_bench.spec.recipe import TokenDrop
from tests.projection.published_rows import inferred, rule_of

Columns = Mapping[str, object]

BRIDGE_25_09: Columns = {
    "version": "NeMo 25.09 (fa0315ae2, 2025-10)",
    "source": {"table": "25.09 NeMo Container"},
}
BRIDGE_25_11: Columns = {
    "version": "NeMo 25.11 (v0.2.0, 2025-12)",
    "source": {"table": "25.11 NeMo Container"},
}
BRIDGE_26_06: Columns = {
    "version": "NeMo 26.06 (v0.5.0, 2026-06)",
    "source": {"table": "26.06 NeMo Container"},
}
NEMO_24: Columns = {"framework": "NeMo 24.09", "version": "v24.11.1", "source": {}}
NEMO_25_05: Columns = {"framework": "NeMo 2.x / Megatron-Core", "version": "v25.05.05", "source": {}}
ZOO: Columns = {"framework": "Megatron-LM (ModelZoo)", "version": "2026-05-13", "source": {}}
FOLDING: Columns = {
    "framework": "Megatron-Core (2025-04)",
    "version": "2025-04-21",
    "source": {},
    "method": "MCore",
}
AUTOMODEL: Columns = {
    "framework": "NeMo Automodel",
    "version": "2026-06-08",
    "source": {},
    "sharding": "fsdp2",
}
TORCHTITAN: Columns = {"framework": "torchtitan", "version": "2025-12-17", "source": {}, "sharding": "fsdp2"}
DEEPSEEK: Columns = {
    "model": "DeepSeek-V3",
    "num_gpus": 1024,
    "tp": 2,
    "pp": 8,
    "vpp": 4,
    "ep": 64,
    "gbs": 8192,
}
GROK: Columns = {"model": "Grok-1-314B", "num_gpus": 512, "tp": 4, "pp": 8, "vpp": 8, "cp": 2, "gbs": 1024}


def made(*parts: Columns, **columns: object) -> InferredRun:
    merged: dict[str, object] = {}
    for part in parts:
        merged.update(part)
    return inferred(**(merged | columns))


@pytest.mark.parametrize(
    ("run", "dispatcher"),
    [
        (made(), "alltoall"),
        (made(dispatcher="hybridep"), "hybridep"),
        (made(BRIDGE_25_09, DEEPSEEK), "deepep"),
        (made(BRIDGE_25_09, DEEPSEEK, token_drop=True), "alltoall"),
        (made(BRIDGE_25_11, hardware="GB300"), "hybridep"),
        (made(BRIDGE_25_11, model="GPT-OSS-120B", hardware="GB300"), "alltoall"),
        (made(NEMO_25_05, DEEPSEEK, vpp=None), "alltoall"),
        (made(DEEPSEEK), "deepep"),
        (made(DEEPSEEK, hardware="GB200"), "hybridep"),
        (made(AUTOMODEL), "deepep"),
        (made(AUTOMODEL, hardware="GB200"), "hybridep"),
        (made(FOLDING), "alltoall"),
        (made(ZOO), "alltoall"),
    ],
)
def test_dispatcher_of_suite_and_date(run: InferredRun, dispatcher: str) -> None:
    assert run.recipe.dispatch.dispatcher == dispatcher


@pytest.mark.parametrize(
    ("run", "capacity", "routing"),
    [
        (made(), None, "random_logits"),
        (made(force_load_balance=False), None, "natural"),
        (made(kind="pretrain_functional"), None, "natural"),
        (made(AUTOMODEL, force_load_balance=True), None, "round_robin"),
        (
            made(BRIDGE_25_09, token_drop=True),
            TokenDrop(capacity_factor=1.0, pad_to_capacity=True),
            "natural",
        ),
        (made(NEMO_24, GROK), TokenDrop(capacity_factor=1.0, pad_to_capacity=True), "natural"),
        (made(NEMO_25_05), None, "random_logits"),
        (made(ZOO, capacity_factor=1.5), TokenDrop(capacity_factor=1.5), "natural"),
        (made(ZOO, capacity_factor=1.5, token_drop=False), None, "random_logits"),
    ],
)
def test_capacity_and_routing(run: InferredRun, capacity: TokenDrop | None, routing: str) -> None:
    assert (run.recipe.token_drop, run.recipe.routing.mode) == (capacity, routing)


@pytest.mark.parametrize(
    ("run", "implementation", "modules"),
    [
        (made(), "none", ()),
        (made(cuda_graph="none", cuda_graph_modules=("full_iteration",)), "none", ()),
        (made(cuda_graph="local", cuda_graph_modules=("full_iteration",)), "full_iteration", ()),
        (made(cuda_graph="transformer_engine", cuda_graph_modules=("mamba", "attn")),
         "transformer_engine", ("attn",)),
        (made(cuda_graph="transformer_engine", cuda_graph_modules=("mamba",)), "none", ()),
        (made(cuda_graph="transformer_engine"), "transformer_engine",
         ("attn", "moe_router", "moe_preprocess")),
        (made(BRIDGE_25_09, hardware="B200"), "local", ()),
        (made(BRIDGE_25_09), "none", ()),
        (made(BRIDGE_25_11, hardware="GB300"), "transformer_engine", ("moe_router", "moe_preprocess")),
        (made(NEMO_25_05, GROK, hardware="GB200", pp=1, vpp=None, cp=1), "local", ()),
    ],
)  # fmt: skip
def test_cuda_graphs(run: InferredRun, implementation: str, modules: tuple[str, ...]) -> None:
    assert (run.recipe.cuda_graphs.implementation, run.recipe.cuda_graphs.modules) == (
        implementation,
        modules,
    )


@pytest.mark.parametrize(
    ("run", "granularity", "modules"),
    [
        (made(), "none", ()),
        (made(recompute="none"), "none", ()),
        (made(recompute="full"), "full", ()),
        (made(recompute=("moe_act", "mhc")), "selective", ("moe_act",)),
        (made(TORCHTITAN, recompute="selective"), "full", ()),
        (made(BRIDGE_25_09, DEEPSEEK), "selective", ("mla_up_proj", "mlp")),
        (made(BRIDGE_25_09, DEEPSEEK, hardware="GB200"), "selective", ("mla_up_proj", "mlp", "moe_act")),
        (made(BRIDGE_25_11, DEEPSEEK, hardware="GB300"), "selective", ("moe_act",)),
        (made(BRIDGE_25_11, model="GPT-OSS-120B"), "selective", ("layernorm", "moe_act")),
        (made(NEMO_25_05, DEEPSEEK, vpp=None), "selective", ("mla_up_proj",)),
        (made(NEMO_25_05, DEEPSEEK, vpp=None, hardware="GB200"), "selective", ("core_attn",)),
    ],
)
def test_recomputation(run: InferredRun, granularity: str, modules: tuple[str, ...]) -> None:
    assert (run.recipe.recompute.granularity, run.recipe.recompute.modules) == (granularity, modules)


@pytest.mark.parametrize(
    ("run", "expert_tensor"),
    [
        (made(tp=2), 1),
        (made(NEMO_24, GROK), 4),
        (made(NEMO_25_05, GROK), 1),
        (made(NEMO_25_05, GROK, hardware="GB200"), 4),
        (made(FOLDING, model="Mixtral-8x22B", num_gpus=128, tp=2, pp=8, ep=4, gbs=256), 2),
        (made(FOLDING, model="Mixtral-8x22B", num_gpus=128, tp=2, pp=8, ep=8, gbs=256, method="Folding"), 1),
    ],
)
def test_expert_tensor_size(run: InferredRun, expert_tensor: int) -> None:
    assert run.recipe.parallel.expert_tensor == expert_tensor


def test_parallel_folding_prints_neither_micro_batch_nor_virtual_stages() -> None:
    run = made(FOLDING, model="Mixtral-8x22B", num_gpus=128, tp=2, pp=8, ep=4, gbs=256, mbs=None)
    assert (run.recipe.micro_batch_size, run.recipe.parallel.virtual_pipeline) == (1, 7)


def test_torchtitan_trains_one_local_batch_per_step() -> None:
    run = made(TORCHTITAN, num_gpus=64, pp=2, mbs=None, gbs=None, local_batch=16,
               pipeline_schedule="interleaved1f1b")  # fmt: skip
    # DP = 64 / 2
    assert (run.recipe.global_batch_size, run.recipe.micro_batch_size) == (16 * 32, 1)
    assert run.recipe.parallel.virtual_pipeline == 2
    assert run.recipe.kernels.family == "torch_native"


def test_a_schedule_that_no_recipe_can_ask_for_stays_on_the_stack() -> None:
    assert made(pipeline_schedule="zbv").stack.pipeline_schedule == "zbv"
    assert made(pipeline_schedule="1f1b").stack.pipeline_schedule is None


def test_fsdp_over_the_whole_job_leaves_no_other_ranks() -> None:
    run = made(TORCHTITAN, model="Llama3-8B", num_gpus=8, num_shards=8, tp=None, pp=None, ep=None, mbs=None,
               gbs=None, seq_len=None)  # fmt: skip
    assert run.recipe.parallel.tensor == run.recipe.parallel.pipeline == 1
    assert (run.recipe.seq_len, run.recipe.global_batch_size) == (8192, 8)


@pytest.mark.parametrize(
    ("run", "overlap", "delayed"),
    [
        (made(), False, False),
        (made(ep_overlap=True), True, True),
        (made(ep_overlap=True, delay_wgrad=False), True, False),
        (made(ep_overlap=True, kind="pretrain_functional"), True, False),
        (made(BRIDGE_25_09, DEEPSEEK), True, True),
        (made(BRIDGE_25_11), True, True),
    ],
)
def test_overlap_of_dispatch(run: InferredRun, overlap: bool, delayed: bool) -> None:
    assert (run.recipe.overlap.expert_parallel, run.recipe.overlap.delayed_wgrad) == (overlap, delayed)


def test_fused_experts_came_with_bridge_26_06() -> None:
    before = made(precision="MXFP8", hardware="GB200")
    after = made(BRIDGE_26_06, precision="MXFP8", hardware="GB200", cuda_graph="full_iteration")
    assert not before.recipe.kernels.op_fuser
    assert after.recipe.kernels.op_fuser
    assert after.recipe.offload.paged_stash
    assert after.recipe.mcore == {"moe_expert_rank_capacity_factor": 1.5}


@pytest.mark.parametrize(
    ("run", "precision"),
    [
        (made(NEMO_24, model="Llama3.1-70B", precision="FP8", ep=None), "fp8_delayed"),
        (made(TORCHTITAN, precision="FP8"), "fp8_tensorwise"),
        (made(precision="FP8-blockwise"), "fp8_blockwise"),
    ],
)
def test_fp8_alone_is_the_scaling_of_the_suite(run: InferredRun, precision: str) -> None:
    assert run.recipe.precision == precision


def test_types_of_optimizer_state_follow_suite_and_model() -> None:
    assert made(DEEPSEEK).recipe.optimizer.exp_avg_dtype == "bf16"
    assert made().recipe.optimizer.exp_avg_dtype == "fp32"
    assert made(ZOO).recipe.optimizer.gradient_dtype == "fp32"
    assert made().recipe.optimizer.gradient_dtype == "bf16"
    assert made(optimizer={"exp_avg": "bf16"}).recipe.optimizer.exp_avg_sq_dtype == "bf16"


def test_early_nemo_has_neither_grouped_experts_nor_their_fusions() -> None:
    kernels = made(NEMO_24, GROK).recipe.kernels
    assert not kernels.grouped_gemm
    assert not kernels.fusions.permute
    assert kernels.fusions.rope


def test_what_is_printed_is_no_assumption() -> None:
    run = made(dispatcher="deepep", recompute="none", cuda_graph="none", etp=1, ep_overlap=False)
    fields = {one.field for one in run.assumptions}
    assert not fields & {"dispatch.dispatcher", "recompute", "cuda_graphs", "parallel.expert_tensor"}
    assert rule_of(run, "routing.mode") == "balance is forced in benchmarks"


def test_rules_of_one_field_have_names_of_their_own() -> None:
    names = [(rule.field, rule.name) for rule in RULES]
    assert len(names) == len(set(names))


def test_rules_of_a_release_stand_before_the_others_of_their_field() -> None:
    seen: set[str] = set()
    late = []
    for rule in RULES:
        if (
            rule.is_of_release
            and rule.field in seen
            and rule.name != "no CUDA graphs in Bridge's configuration"
        ):
            late.append(rule.name)
        if not rule.is_of_release:
            seen.add(rule.field)
    assert late in ([], ["DeepEP of Bridge 25.09", "HybridEP of Bridge 25.11"])
