"""What must hold for communication to run beside computation."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.layers import stages_of
from moe_bench.spec.legality.rule import Found, rule
from moe_bench.spec.recipe import Recipe

_ARGUMENTS = "megatron/training/arguments.py"
_CONFIG = "megatron/core/transformer/transformer_config.py"


@rule("only a sharded optimizer gathers parameters", f"{_ARGUMENTS}:991")
def param_gather_overlap(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.param_gather and recipe.parallel.data_sharding == "none":
        yield "overlap.param_gather", "true with data_sharding none", "write false"


@rule("gathering parameters early needs gradients reduced early", f"{_ARGUMENTS}:994")
def param_gather_needs_grad_reduce(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.param_gather and not recipe.overlap.grad_reduce:
        yield "overlap.grad_reduce", "false with param_gather", "write true"


@rule(
    "chunks are gathered one by one under the optimizer step",
    f"{_ARGUMENTS}:1033",
    f"{_ARGUMENTS}:1035",
    f"{_ARGUMENTS}:1037",
    f"{_ARGUMENTS}:1039",
)
def param_gather_with_step(recipe: Recipe) -> Iterator[Found]:
    overlap, key = recipe.overlap, "overlap.param_gather_with_optimizer_step"
    if not overlap.param_gather_with_optimizer_step:
        return
    if recipe.parallel.data_sharding != "distributed_optimizer":
        yield key, f"true with data_sharding {recipe.parallel.data_sharding}", "write false"
    if not overlap.param_gather:
        yield key, "true without overlap.param_gather", "write false, or switch that on too"
    if recipe.parallel.virtual_pipeline == 1:
        yield key, "true without virtual stages", "write false"


@rule("only the interleaved schedule aligns the gathers of its stages", f"{_ARGUMENTS}:979")
def aligned_param_gather(recipe: Recipe) -> Iterator[Found]:
    overlap = recipe.overlap
    if overlap.align_param_gather and recipe.parallel.virtual_pipeline == 1:
        yield "overlap.align_param_gather", "true without virtual stages", "write false"
    elif overlap.align_param_gather and not overlap.param_gather:
        yield "overlap.align_param_gather", "true without overlap.param_gather", "write false"


@rule("user buffers carry the sequence-parallel collectives", f"{_ARGUMENTS}:1402")
def tensor_overlap(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.tensor_parallel and not recipe.parallel.sequence_parallel:
        yield "overlap.tensor_parallel", "true without sequence parallelism", "write false"


@rule("user buffers are Transformer Engine's", "megatron/training/initialize.py:157")
def tensor_overlap_kernels(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.tensor_parallel and recipe.kernels.family != "transformer_engine":
        yield "overlap.tensor_parallel", f"true with {recipe.kernels.family}", "write false"


@rule("there is no exchange between expert ranks to hide", f"{_CONFIG}:2680")
def expert_overlap_needs_expert_ranks(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.expert_parallel and recipe.parallel.expert == 1:
        yield "overlap.expert_parallel", "true with EP1", "write false"


@rule("a pipeline hides it between two chunks", f"{_CONFIG}:2675")
def expert_overlap_needs_virtual_stages(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    # the stages of a layout string count, which `layout_stages` holds against the stated ones
    num_stages = len(stages_of(recipe)) or parallel.num_chunks
    if recipe.overlap.expert_parallel and 1 < parallel.pipeline == num_stages:
        yield (
            "overlap.expert_parallel",
            f"true with PP{parallel.pipeline} and no virtual stages",
            "write false, or raise virtual_pipeline",
        )


@rule("the all-gather dispatcher cannot be split from the layer", f"{_CONFIG}:2683")
def expert_overlap_dispatcher(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.expert_parallel and recipe.dispatch.dispatcher == "allgather":
        yield "overlap.expert_parallel", "true with allgather", "use alltoall"


@rule(
    "its schedule runs parts of a layer, which a recompute of all would undo",
    f"{_CONFIG}:2688",
    f"{_CONFIG}:2697",
)
def expert_overlap_recompute(recipe: Recipe) -> Iterator[Found]:
    if not recipe.overlap.expert_parallel:
        return
    if recipe.recompute.granularity == "full":
        yield "recompute.granularity", "full with overlap.expert_parallel", "use selective or none"
    elif recipe.recompute.granularity == "selective" and "moe" in recipe.recompute.modules:
        yield "recompute.modules", "moe with overlap.expert_parallel", "remove moe, moe_act may stay"


@rule("its buffers are 16 bits wide", f"{_CONFIG}:2702")
def expert_overlap_precision(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.expert_parallel and recipe.precision == "fp32":
        yield "overlap.expert_parallel", "true with precision fp32", "write false"


@rule("both would run in the gap of one exchange", f"{_CONFIG}:2706")
def two_overlaps(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.expert_parallel and recipe.overlap.shared_experts:
        yield "overlap.shared_experts", "true with overlap.expert_parallel", "write false"


@rule("its schedule knows one MTP module", f"{_CONFIG}:2709")
def expert_overlap_mtp(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.expert_parallel and recipe.num_mtp_layers > 1:
        yield "num_mtp_layers", f"{recipe.num_mtp_layers} with overlap.expert_parallel", "write 1"


@rule("it keeps the input of the first product, which the schedule frees", f"{_CONFIG}:2729")
def expert_overlap_offload(recipe: Recipe) -> Iterator[Found]:
    frees_input = recipe.overlap.expert_parallel and recipe.dispatch.dispatcher == "ncclep"
    if frees_input and "expert_fc1" in recipe.offload.modules:
        yield "offload.modules", "expert_fc1 with ncclep and overlap.expert_parallel", "remove expert_fc1"


@rule("held-back weight gradients fill the gaps of overlap.expert_parallel", f"{_CONFIG}:2750")
def delayed_wgrad(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.delayed_wgrad and not recipe.overlap.expert_parallel:
        yield (
            "overlap.delayed_wgrad",
            "true without overlap.expert_parallel",
            "write false, or switch that on too",
        )


@rule("only Transformer Engine's layers split their backward", f"{_ARGUMENTS}:1823")
def delayed_wgrad_kernels(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.delayed_wgrad and recipe.kernels.family != "transformer_engine":
        yield "overlap.delayed_wgrad", f"true with {recipe.kernels.family}", "write false"


@rule("there are no shared experts to hide", "megatron/core/transformer/moe/moe_layer.py:334")
def shared_overlap_needs_shared_experts(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.shared_experts and not _has_shared_experts(recipe):
        yield "overlap.shared_experts", "true without shared experts", "write false"


@rule("the all-gather dispatcher has no place for shared experts", f"{_CONFIG}:1648")
def shared_overlap_dispatcher(recipe: Recipe) -> Iterator[Found]:
    is_overlapped = recipe.overlap.shared_experts and _has_shared_experts(recipe)
    if is_overlapped and recipe.dispatch.dispatcher == "allgather":
        yield "overlap.shared_experts", "true with allgather", "use alltoall"


RULES = (
    param_gather_overlap, param_gather_needs_grad_reduce, param_gather_with_step, aligned_param_gather,
    tensor_overlap, tensor_overlap_kernels, expert_overlap_needs_expert_ranks,
    expert_overlap_needs_virtual_stages, expert_overlap_dispatcher, expert_overlap_recompute,
    expert_overlap_precision, two_overlaps, expert_overlap_mtp, expert_overlap_offload, delayed_wgrad,
    delayed_wgrad_kernels, shared_overlap_needs_shared_experts, shared_overlap_dispatcher,
)  # fmt: skip


def _has_shared_experts(recipe: Recipe) -> bool:
    return recipe.model.moe is not None and recipe.model.moe.shared_expert_ffn_hidden_size > 0
