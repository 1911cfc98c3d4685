"""The recipe that a dry run builds: the same layout and sizes on torch-native BF16 kernels, row by row."""

from __future__ import annotations

from moe_bench.errors import BadInputError
from moe_bench.spec.recipe import CudaGraphs, DispatchSpec, Fusions, KernelSpec, Offload, Overlap, Recipe
from moe_bench.spec.scale import Plan, Substitution, adam_with_plain_states, differences

_BUILT = ("fp32", "bf16", "fp8_rowwise")
"""Precisions of the torch-native kernels."""

_REASONS = {
    "parallel": "torch-native attention gathers keys and values over the context ranks",
    "precision": "FP8 and FP4 are Transformer Engine's, but for scales per row",
    "low_precision": "FP8 and FP4 are Transformer Engine's",
    "kernels": "Transformer Engine does not load without a GPU; its fused kernels have stand-ins",
    "dispatch": "DeepEP, HybridEP, NCCL EP need a GPU",
    "overlap": "Transformer Engine's",
    "cuda_graphs": "nothing is launched that could be captured",
    "offload": "what is offloaded is counted on the device",
    "optimizer": "Muon, FP16 and FP8 states are Transformer Engine's",
    "mcore": "options of kernels that are not built",
}


def dryrun_plan(recipe: Recipe, *, modified: tuple[str, ...]) -> Plan:
    """What a dry run of `recipe` builds, and how it departs from what was asked."""
    derived = _derived(recipe)
    return Plan(
        recipe=derived,
        asked=recipe.name,
        scale="dryrun",
        substitutions=(*differences(recipe, derived, _REASONS), _balanced(recipe)),
        modified=modified,
    )


def ranks_to_run(recipe: Recipe, *, rank: int | None, all_stages: bool) -> tuple[int, ...]:
    """The ranks that a user asked for: one, or the first of every pipeline stage.

    Pipeline ranks are the outermost (Megatron-Core's order tp-cp-ep-dp-pp). Raises BadInputError for a rank
    that does not exist, and where both are asked for.
    """
    num_gpus = recipe.parallel.num_gpus
    if all_stages:
        if rank is not None:
            raise BadInputError(
                "--rank with --all-stages: the stages choose the ranks; leave one of them out"
            )
        return tuple(range(0, num_gpus, num_gpus // recipe.parallel.pipeline))
    wanted = rank or 0
    if not 0 <= wanted < num_gpus:
        raise BadInputError(f"--rank {wanted}: the recipe has ranks 0 to {num_gpus - 1}; name one of them")
    return (wanted,)


def require_micro_batches(recipe: Recipe, num_micro_batches: int) -> None:
    """Raise BadInputError unless the rank's schedule runs so many, and a whole step can be told from them.

    The interleaved schedule wants whole groups, or at least a pipeline's length left over
    (pipeline_parallel/schedules.py, forward_backward_pipelining_with_interleaving). Megatron-FSDP's first and
    last micro batch differ from those between.
    """
    parallel, limit = recipe.parallel, recipe.num_micro_batches
    group = max(parallel.pipeline, parallel.micro_batch_group_size)
    is_whole = num_micro_batches == limit
    if not 1 <= num_micro_batches <= limit:
        problem, fix = f"a step has {limit}", f"1 to {limit}"
    elif parallel.virtual_pipeline > 1 and not (
        num_micro_batches >= group and num_micro_batches % group in (0, *range(parallel.pipeline, group))
    ):
        problem, fix = f"the interleaved schedule runs groups of {group}", f"a multiple of {group}"
    elif parallel.data_sharding == "megatron_fsdp" and num_micro_batches < 3 and not is_whole:
        problem, fix = "Megatron-FSDP's first and last differ from those between", f"{min(3, limit)} or more"
    else:
        return
    raise BadInputError(f"--micro-batches {num_micro_batches}: {problem}; use {fix}")


def _derived(recipe: Recipe) -> Recipe:
    parallel = recipe.parallel
    return recipe.model_copy(
        update={
            "parallel": parallel.model_copy(
                update={"context_comm": "allgather" if parallel.context > 1 else parallel.context_comm}
            ),
            "precision": recipe.precision if recipe.precision in _BUILT else "bf16",
            "low_precision": None,
            "kernels": _kernels(recipe.kernels),
            "dispatch": _dispatch(recipe.dispatch),
            "overlap": _overlap(recipe.overlap),
            "cuda_graphs": CudaGraphs(),
            "offload": Offload(),
            "optimizer": adam_with_plain_states(recipe.optimizer),
            "mcore": {},
        }
    )


def _kernels(kernels: KernelSpec) -> KernelSpec:
    """Fusions stay where the dry run has a stand-in; Transformer Engine's product that adds has none."""
    fusions = kernels.fusions
    return KernelSpec(
        family="quack" if kernels.family == "quack" else "torch_native",
        grouped_gemm=kernels.grouped_gemm,
        fusions=Fusions(
            permute=fusions.permute,
            router=fusions.router,
            rope=fusions.rope,
            activation=fusions.activation,
            gradient_accumulation=fusions.gradient_accumulation and kernels.is_torch_native,
            cross_entropy=fusions.cross_entropy,
        ),
    )


def _dispatch(dispatch: DispatchSpec) -> DispatchSpec:
    dispatcher = dispatch.dispatcher if dispatch.dispatcher == "allgather" else "alltoall"
    return dispatch.model_copy(
        update={"dispatcher": dispatcher, "num_sms": None, "high_priority_stream": False}
    )


def _overlap(overlap: Overlap) -> Overlap:
    return overlap.model_copy(update={"delayed_wgrad": False, "tensor_parallel": False})


def _balanced(recipe: Recipe) -> Substitution:
    return Substitution(
        field="routing.mode",
        asked=recipe.routing.mode,
        used="balanced counts",
        why="there are no values to route by; --routing takes a matrix of counts",
    )
