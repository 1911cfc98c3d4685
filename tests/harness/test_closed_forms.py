"""What real Megatron-Core sends and multiplies is, to the byte and the operation, what the closed forms say.

One rank of every pipeline stage takes a whole step among loopback groups (the dry run), on toy sizes of real
structures. Scalars are left out on both sides: loss, gradient norm.
"""

import functools
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from moe_bench.analysis.collectives import Group
from moe_bench.analysis.comms import step_transfers
from moe_bench.analysis.rank_flops import rank_flops
from moe_bench.harness.dryrun.one_rank import dry_run_rank
from moe_bench.harness.dryrun.outcome import RankDryRun, TrafficLine
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.derive_dryrun import dryrun_plan
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ExpertStep
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import (
    DispatchSpec,
    KernelSpec,
    OptimizerSpec,
    Overlap,
    Recipe,
    Recompute,
    Routing,
    TokenDrop,
)
from moe_bench.spec.scale import smoke_plan
from tests.harness.meta_builds import first_rank_of

LOADER = Loader(root=recipes_root())
SCALAR_BYTES = 8
SAME_RANKS = {"DPxCP (one instance)": "DPxCP", "EDP (one instance)": "EDP", "world": "PP"}
"""Groups that Megatron-Core names twice; with two stages it receives over the group of all ranks."""
NONE = Recompute()
FULL = Recompute(granularity="full", method="uniform", num_layers=1)
BLOCK = Recompute(granularity="full", method="block", num_layers=2)
LATE, EARLY = Overlap(), Overlap(grad_reduce=True, param_gather=True)
SPLIT = {"tensor": 2, "sequence_parallel": True}
DENSE = {"moe": None, "dense_ffn_hidden_size": 128}
FSDP = {"data_sharding": "megatron_fsdp"}


def selective(*modules: str) -> Recompute:
    return Recompute.model_validate({"granularity": "selective", "modules": modules})


def toy(
    key: str,
    layout: Mapping[str, object],
    *,
    model: Mapping[str, object] = {},
    router: Mapping[str, object] = {},
    steps: Sequence[tuple[int, int, int]] = (),
    **fields: object,
) -> Recipe:
    """Four layers of a model's structure on a layout; two micro batches."""
    asked = LOADER.recipe(find_recipe(key, LOADER))
    smoke = smoke_plan(asked, host=LOADER.system("cpu_host"), modified=()).recipe
    if router and smoke.model.moe is not None:
        fields = {"kernels": KernelSpec(family="torch_native"), **fields}
        no_loss = {"aux_loss": "none", "aux_loss_coefficient": 0.0}
        changed = smoke.model.moe.router.model_copy(update={**no_loss, **router})
        model = {**model, "moe": smoke.model.moe.model_copy(update={"router": changed})}
    if steps and smoke.model.moe is not None:
        pyramid = tuple(
            ExpertStep(from_layer=layer, num_experts=number, expert_ffn_hidden_size=width)
            for layer, number, width in steps
        )
        plain = smoke.model.moe.router.model_copy(update={"expert_bias": False, "num_groups": None})
        plain = plain.model_copy(update={"groups_per_token": None})
        model = {**model, "moe": smoke.model.moe.model_copy(update={"steps": pyramid, "router": plain})}
    parallel = ParallelSpec.model_validate({"context_comm": "allgather", **layout})
    defaults = {
        "system": LOADER.system("h100_sxm"),
        "parallel": parallel,
        "model": smoke.model.model_copy(update={"num_layers": 4, **model}),
        "num_mtp_layers": 0,
        "micro_batch_size": 1,
        "global_batch_size": 2 * parallel.data,
        "routing": Routing(mode="round_robin"),
        "recompute": NONE,
        "overlap": LATE,
        "token_drop": None,
    }
    return dryrun_plan(smoke.model_copy(update=defaults | fields), modified=()).recipe


CASES: Mapping[str, Recipe] = {
    "latent attention over TP2, EP2": toy("deepseek_v3", {**SPLIT, "num_gpus": 4, "expert": 2}),
    "gradients and parameters beside computation": toy(
        "deepseek_v3", {**SPLIT, "num_gpus": 4, "expert": 2}, overlap=EARLY
    ),
    "everything recomputed, MTP": toy(
        "deepseek_v3", {**SPLIT, "num_gpus": 4, "expert": 2}, recompute=FULL, num_mtp_layers=1
    ),
    "two layers of each chunk recomputed": toy(
        "deepseek_v3", {**SPLIT, "num_gpus": 4, "expert": 2}, recompute=BLOCK
    ),
    "experts, up-projections and dense MLPs recomputed": toy(
        "deepseek_v3",
        {**SPLIT, "num_gpus": 4, "expert": 2},
        recompute=selective("moe", "mla_up_proj", "mlp", "layernorm"),
        num_mtp_layers=1,
    ),
    "shared experts recomputed": toy(
        "deepseek_v3",
        {**SPLIT, "num_gpus": 4, "expert": 2},
        recompute=selective("shared_experts", "moe_act", "mla_up_proj"),
    ),
    "shared experts beside the dispatch": toy(
        "deepseek_v3", {**SPLIT, "num_gpus": 4, "expert": 2}, overlap=Overlap(shared_experts=True)
    ),
    "PP2 x VPP2 with MTP": toy(
        "deepseek_v3",
        {"num_gpus": 8, "pipeline": 2, "virtual_pipeline": 2, "expert": 2},
        num_mtp_layers=1,
        overlap=Overlap(p2p=True),
    ),
    "MTP with the loss, by layout string": toy(
        "deepseek_v3",
        {**SPLIT, "num_gpus": 4, "pipeline": 2, "layout": "Ettt|tmL", "expert": 2},
        num_mtp_layers=1,
        overlap=EARLY,
    ),
    "MTP on a chunk of its own": toy(
        "deepseek_v3",
        {"num_gpus": 4, "pipeline": 2, "virtual_pipeline": 2, "layout": "Ett|tt|m|L", "expert": 2},
        num_mtp_layers=1,
        overlap=Overlap(p2p=True),
    ),
    "sinks, windows and biases over TP2, CP2, EP2": toy(
        "gpt_oss_20b", {**SPLIT, "num_gpus": 8, "context": 2, "expert": 2}
    ),
    "core attention recomputed under CP2": toy(
        "gpt_oss_20b", {"num_gpus": 4, "context": 2, "expert": 2}, recompute=selective("core_attn")
    ),
    "latent attention without query compression under CP2": toy(
        "deepseek_v2_lite", {"num_gpus": 2, "context": 2}
    ),
    "ETP2 as wide as TP2": toy("mixtral_8x7b", {**SPLIT, "num_gpus": 8, "expert": 2, "expert_tensor": 2}),
    "ETP2 under TP1": toy("mixtral_8x7b", {"num_gpus": 4, "expert": 2, "expert_tensor": 2}),
    "padded to capacity": toy(
        "mixtral_8x7b",
        {"num_gpus": 4, "expert": 2},
        token_drop=TokenDrop(capacity_factor=1.25, pad_to_capacity=True),
    ),
    "balanced by Sinkhorn": toy(
        "mixtral_8x7b", {"num_gpus": 4, "expert": 2}, router={"choice": "sinkhorn", "renormalise": False}
    ),
    "GShard's two experts": toy(
        "mixtral_8x7b",
        {"num_gpus": 4, "expert": 2},
        router={"choice": "gshard"},
        token_drop=TokenDrop(capacity_factor=1.25, policy="position"),
    ),
    "expert choice": toy(
        "mixtral_8x7b",
        {**SPLIT, "num_gpus": 4, "expert": 2},
        router={"choice": "expert_choice", "renormalise": False},
        token_drop=TokenDrop(capacity_factor=1.25, pad_to_capacity=True),
    ),
    "padded to a minimum, the first of the sequence": toy(
        "mixtral_8x7b",
        {"num_gpus": 4, "expert": 2},
        token_drop=TokenDrop(capacity_factor=0.5, pad_to_capacity=True, min_capacity=40, policy="position"),
    ),
    "a pyramid of experts over PP2, EP2": toy(
        "deepseek_v2_lite",
        {"num_gpus": 4, "pipeline": 2, "expert": 2},
        steps=[(2, 16, 48), (3, 32, 24)],
    ),
    "a pyramid of experts, recomputed, MTP, over TP2, EP2": toy(
        "glm_4_5_air",
        {**SPLIT, "num_gpus": 4, "expert": 2},
        steps=[(2, 16, 64)],
        recompute=FULL,
        num_mtp_layers=1,
    ),
    "residual experts, GELU, LayerNorm, learned positions over EP2": toy(
        "pr_moe_350m", {"num_gpus": 4, "expert": 2}
    ),
    "the same over TP2, PP2, EP2, recomputed": toy(
        "pr_moe_350m", {**SPLIT, "num_gpus": 8, "pipeline": 2, "expert": 2}, recompute=FULL
    ),
    "residual experts recomputed": toy(
        "pr_moe_350m", {"num_gpus": 2, "expert": 2}, recompute=selective("shared_experts", "layernorm")
    ),
    "tokens gathered over ETP2 x EP2": toy(
        "mixtral_8x7b",
        {**SPLIT, "num_gpus": 8, "expert": 2, "expert_tensor": 2},
        dispatch=DispatchSpec(dispatcher="allgather", router_dtype="fp32"),
    ),
    "tokens gathered, experts recomputed": toy(
        "qwen3_30b_a3b",
        {"num_gpus": 4, "expert": 4},
        recompute=selective("moe"),
        dispatch=DispatchSpec(dispatcher="allgather"),
    ),
    "experts in FP8 with a scale per row, over ETP2": toy(
        "mixtral_8x7b",
        {**SPLIT, "num_gpus": 8, "expert": 2, "expert_tensor": 2},
        precision="fp8_rowwise",
        recompute=selective("moe"),
    ),
    "tokens gathered by the experts": toy(
        "qwen3_30b_a3b", {"num_gpus": 2}, kernels=KernelSpec(family="quack")
    ),
    "tokens gathered where they arrived, shared experts": toy(
        "deepseek_v3", {**SPLIT, "num_gpus": 4, "expert": 2}, kernels=KernelSpec(family="quack")
    ),
    "gradients all-reduced": toy("mixtral_8x7b", {"num_gpus": 4, "expert": 2, "data_sharding": "none"}),
    "whole-vector norms over TP2": toy("olmoe_1b_7b", {**SPLIT, "num_gpus": 4, "expert": 2}),
    "several sequences in a micro batch": toy(
        "glm_4_5_air", {**SPLIT, "num_gpus": 4, "expert": 2}, micro_batch_size=2, global_batch_size=8
    ),
    "dense, without sequence parallelism": toy("qwen3_30b_a3b", {"num_gpus": 4, "tensor": 2}, model=DENSE),
    "Megatron-FSDP, everything sharded, over TP2, EP2, recomputed, MTP": toy(
        "deepseek_v3",
        {**SPLIT, **FSDP, "num_gpus": 8, "expert": 2},
        recompute=FULL,
        num_mtp_layers=1,
        overlap=EARLY,
        optimizer=OptimizerSpec(),
    ),
    "Megatron-FSDP, rows of other widths and biases over DP3": toy(
        "gpt_oss_20b",
        {**FSDP, "num_gpus": 6, "expert": 2},
        overlap=EARLY,
        optimizer=OptimizerSpec(),
    ),
    "Megatron-FSDP, gradients and states sharded": toy(
        "mixtral_8x7b", {**FSDP, "num_gpus": 4, "expert": 2, "fsdp_strategy": "optim_grads"}, overlap=EARLY
    ),
    "Megatron-FSDP, states sharded": toy(
        "mixtral_8x7b", {**SPLIT, **FSDP, "num_gpus": 8, "expert": 2, "fsdp_strategy": "optim"}, overlap=EARLY
    ),
    "Megatron-FSDP, two instances": toy(
        "qwen3_30b_a3b", {**FSDP, "num_gpus": 8, "expert": 2, "num_optimizer_instances": 2}, overlap=EARLY
    ),
    "dense, tied embeddings over PP2": toy(
        "qwen3_30b_a3b",
        {**SPLIT, "num_gpus": 4, "pipeline": 2},
        model={**DENSE, "tied_embeddings": True},
    ),
}


@functools.cache
def stepped(case: str, stage: int) -> RankDryRun:
    """One rank's whole step."""
    recipe = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return dry_run_rank(recipe, first_rank_of(recipe, stage), num_micro_batches=recipe.num_micro_batches)


def traffic(case: str, stage: int) -> list[TrafficLine]:
    """The ledger without scalars."""
    return [
        line
        for line in stepped(case, stage).traffic
        if line.op != "all_reduce" or line.num_bytes > SCALAR_BYTES * line.num_calls
    ]


@pytest.mark.parametrize("case", CASES)
def test_a_step_carries_the_counted_bytes(case: str) -> None:
    for stage in range(CASES[case].parallel.pipeline):
        counted = Counter[tuple[str, str]]()
        for transfer in step_transfers(CASES[case], stage):
            counted[str(transfer.op), str(transfer.group)] += transfer.num_bytes
        carried = Counter[tuple[str, str]]()
        for line in traffic(case, stage):
            carried[line.op, SAME_RANKS.get(line.group, line.group)] += line.num_bytes
        assert counted == carried, f"stage {stage}"


def test_a_layer_carries_the_counted_bytes_in_each_pass() -> None:
    case, layer = "everything recomputed, MTP", "decoder.2"
    counted = Counter[tuple[str, str, str]]()
    for transfer in step_transfers(CASES[case], 0):
        if transfer.place == layer:
            counted[str(transfer.phase), str(transfer.op), str(transfer.group)] += transfer.num_bytes
    carried = Counter[tuple[str, str, str]]()
    for line in traffic(case, 0):
        if line.layer == layer and line.group not in (Group.DATA_CONTEXT, Group.EXPERT_DATA):
            carried[line.phase, line.op, line.group] += line.num_bytes
    assert counted == carried
    assert {phase for phase, _, _ in counted} == {"forward", "recompute", "backward"}


@pytest.mark.parametrize("case", CASES)
def test_the_kernels_of_each_layer_spend_the_counted_operations(case: str) -> None:
    for stage in range(CASES[case].parallel.pipeline):
        counted = Counter[tuple[str, str, str]]()
        for part in rank_flops(CASES[case], stage):
            kernel = str(part.kernel)
            counted[kernel, part.place, "forward"] += part.forward_flops
            counted[kernel, part.place, "recompute"] += part.recompute_flops
            counted[kernel, part.place, "backward"] += part.dgrad_flops + part.wgrad_flops
        spent = Counter[tuple[str, str, str]]()
        for line in stepped(case, stage).flops:
            spent[line.kind, line.layer, line.phase] += line.num_flops
        assert counted == spent, f"stage {stage}"
