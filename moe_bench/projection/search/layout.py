"""One layout: a value on each axis of a search, and the recipe that a base recipe becomes in it."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Literal, NamedTuple

from moe_bench.projection.search.splits import Split
from moe_bench.spec.legality.dispatch import HYBRIDEP_MAX_DOMAIN
from moe_bench.spec.legality.sharding import CONNECTIONS
from moe_bench.spec.recipe import (
    HYBRIDEP_DOMAIN,
    CudaGraphs,
    Dispatcher,
    KernelSpec,
    LowPrecision,
    Overlap,
    Recipe,
    Recompute,
)

ContextComm = Literal["p2p", "a2a", "allgather"]
DataSharding = Literal["none", "distributed_optimizer", "megatron_fsdp"]
FsdpStrategy = Literal["optim", "optim_grads", "optim_grads_params"]

_HYBRIDEP_VARIABLES = (
    HYBRIDEP_DOMAIN, "NVLINK_DOMAIN_SIZE", "USE_MNNVL", "NUM_OF_TOKENS_PER_CHUNK_COMBINE_API",
)  # fmt: skip
_HYBRIDEP_FIELDS = ("moe_permute_fusion_into_hybridep", "moe_hybridep_num_sms_preprocessing")
_MANY_CONNECTIONS = "32"


class Widths(NamedTuple):
    """Tensor parallelism of the dense part and of experts."""

    tensor: int
    expert_tensor: int


class Context(NamedTuple):
    """Context parallelism, and what its ranks send each other."""

    size: int
    comm: ContextComm


class Sharding(NamedTuple):
    """What data-parallel ranks divide among them."""

    data_sharding: DataSharding
    fsdp_strategy: FsdpStrategy
    """Read only with `megatron_fsdp`."""
    num_instances: int
    """Groups of ranks that each hold everything."""

    @property
    def is_fsdp(self) -> bool:
        """Whether Megatron-FSDP divides, and not the distributed optimizer."""
        return self.data_sharding == "megatron_fsdp"

    @property
    def divides_gradients(self) -> bool:
        """Whether no rank holds all gradients of its layers."""
        return self.is_fsdp and self.fsdp_strategy != "optim"

    @property
    def divides_weights(self) -> bool:
        """Whether no rank holds all weights of its layers."""
        return self.is_fsdp and self.fsdp_strategy == "optim_grads_params"


class Layout(NamedTuple):
    """One value of each axis."""

    widths: Widths
    context: Context
    micro_batch_size: int
    overlaps_experts: bool
    expert: int
    dispatcher: Dispatcher
    recompute: Recompute
    sharding: Sharding
    split: Split


class Axis(IntEnum):
    """The fields of `Layout`, in order."""

    WIDTHS = 0
    CONTEXT = 1
    MICRO_BATCH = 2
    OVERLAP = 3
    EXPERT = 4
    DISPATCHER = 5
    RECOMPUTE = 6
    SHARDING = 7
    SPLIT = 8


AXES_OF_FIELD: Mapping[str, tuple[Axis, ...]] = {
    "parallel.tensor": (Axis.WIDTHS,),
    "parallel.expert_tensor": (Axis.WIDTHS,),
    "parallel.sequence_parallel": (Axis.WIDTHS,),
    "parallel.context": (Axis.CONTEXT,),
    "parallel.context_comm": (Axis.CONTEXT,),
    "parallel.expert": (Axis.EXPERT,),
    "parallel.pipeline": (Axis.SPLIT,),
    "parallel.virtual_pipeline": (Axis.SPLIT,),
    "parallel.layout": (Axis.SPLIT,),
    "parallel.data_sharding": (Axis.SHARDING,),
    "parallel.fsdp_strategy": (Axis.SHARDING,),
    "parallel.num_optimizer_instances": (Axis.SHARDING,),
    "micro_batch_size": (Axis.MICRO_BATCH,),
    "recompute": (Axis.RECOMPUTE,),
    "dispatch": (Axis.DISPATCHER,),
    "kernels.fusions.gradient_accumulation": (Axis.SHARDING,),
    "low_precision.reuse_grad_buffer": (Axis.SHARDING,),
    "overlap.expert_parallel": (Axis.OVERLAP,),
    "overlap.delayed_wgrad": (Axis.OVERLAP,),
    "overlap.shared_experts": (Axis.OVERLAP,),
    "overlap.tensor_parallel": (Axis.WIDTHS,),
    "overlap.p2p": (Axis.SPLIT,),
    "overlap.grad_reduce": (Axis.SHARDING,),
    "overlap.param_gather": (Axis.SHARDING,),
    "overlap.align_param_gather": (Axis.SHARDING, Axis.SPLIT),
    "overlap.param_gather_with_optimizer_step": (Axis.SHARDING, Axis.SPLIT),
    "cuda_graphs": (Axis.OVERLAP, Axis.RECOMPUTE, Axis.SHARDING),
    "mcore": (Axis.DISPATCHER,),
    "env": (Axis.WIDTHS, Axis.CONTEXT, Axis.OVERLAP, Axis.EXPERT, Axis.DISPATCHER, Axis.SHARDING),
}
"""Fields of a recipe that `recipe_of` changes, and the axes that decide each; all others are the base's."""

FOLLOWS: Mapping[str, str] = {
    "parallel.sequence_parallel": "parallel.tensor",
    "overlap.p2p": "parallel.virtual_pipeline",
    f"env.{CONNECTIONS}": "parallel.tensor, parallel.context and parallel.data_sharding",
    f"env.{HYBRIDEP_DOMAIN}": "parallel.expert",
}
"""Fields whose value a layout decides alone, and by which of its own."""


def recipe_of(base: Recipe, layout: Layout) -> Recipe:
    """`base` in another layout; what follows from a layout follows, everything else stays."""
    split, widths, sharding = layout.split, layout.widths, layout.sharding
    uses_hybridep = layout.dispatcher == "hybridep"
    num_sms = base.dispatch.num_sms if layout.dispatcher == base.dispatch.dispatcher else None
    return base.model_copy(
        update={
            "parallel": base.parallel.model_copy(
                update={
                    "tensor": widths.tensor,
                    "expert_tensor": widths.expert_tensor,
                    "sequence_parallel": widths.tensor > 1,
                    "context": layout.context.size,
                    "context_comm": layout.context.comm,
                    "expert": layout.expert,
                    "pipeline": split.pipeline,
                    "virtual_pipeline": split.virtual_pipeline,
                    "layout": split.layout,
                    "data_sharding": sharding.data_sharding,
                    "fsdp_strategy": sharding.fsdp_strategy,
                    "num_optimizer_instances": sharding.num_instances,
                }
            ),
            "micro_batch_size": layout.micro_batch_size,
            "recompute": layout.recompute,
            "dispatch": base.dispatch.model_copy(
                update={"dispatcher": layout.dispatcher, "num_sms": num_sms}
            ),
            "kernels": _kernels(base, sharding),
            "low_precision": _low_precision(base, sharding),
            "overlap": _overlap(base, layout),
            "cuda_graphs": _graphs(base, layout),
            "env": _env(base, layout),
            "mcore": base.mcore
            if uses_hybridep
            else {name: value for name, value in base.mcore.items() if name not in _HYBRIDEP_FIELDS},
        }
    )


def _kernels(base: Recipe, sharding: Sharding) -> KernelSpec:
    """The base's; torch's experts have no whole gradient buffer to add to under Megatron-FSDP."""
    kernels = base.kernels
    if not sharding.is_fsdp or not kernels.is_torch_native or not kernels.fusions.gradient_accumulation:
        return kernels
    fusions = kernels.fusions.model_copy(update={"gradient_accumulation": False})
    return kernels.model_copy(update={"fusions": fusions})


def _low_precision(base: Recipe, sharding: Sharding) -> LowPrecision | None:
    """The base's; Megatron-FSDP gathers MXFP8 weights into buffers of its own."""
    low = base.low_precision
    if low is None or not low.reuse_grad_buffer or not sharding.is_fsdp:
        return low
    return low.model_copy(update={"reuse_grad_buffer": False})


def _overlap(base: Recipe, layout: Layout) -> Overlap:
    """The base's; virtual stages hide transfers, and Megatron-FSDP hides all that it gathers and reduces."""
    overlap, sharding = base.overlap, layout.sharding
    has_virtual = layout.split.virtual_pipeline > 1
    by_chunk = has_virtual and sharding.data_sharding == "distributed_optimizer"
    return overlap.model_copy(
        update={
            "expert_parallel": layout.overlaps_experts,
            "delayed_wgrad": overlap.delayed_wgrad and layout.overlaps_experts,
            "shared_experts": overlap.shared_experts and not layout.overlaps_experts,
            "tensor_parallel": overlap.tensor_parallel and layout.widths.tensor > 1,
            "p2p": has_virtual,
            "grad_reduce": overlap.grad_reduce or sharding.divides_gradients,
            "param_gather": overlap.param_gather or sharding.divides_weights,
            "align_param_gather": overlap.align_param_gather and by_chunk,
            "param_gather_with_optimizer_step": overlap.param_gather_with_optimizer_step and by_chunk,
        }
    )


def _graphs(base: Recipe, layout: Layout) -> CudaGraphs:
    """The base's; none of layers that are recomputed as a whole, which cannot be captured alone, nor of those
    that Megatron-FSDP and expert overlap run part by part.
    """
    graphs = base.cuda_graphs
    is_by_layer = graphs.implementation in ("local", "transformer_engine")
    is_split = layout.sharding.is_fsdp and layout.overlaps_experts
    return CudaGraphs() if is_by_layer and (layout.recompute.granularity == "full" or is_split) else graphs


def _env(base: Recipe, layout: Layout) -> dict[str, str]:
    """The base's environment with the variables that a layout decides: connections and HybridEP's domain."""
    system = base.system
    env = dict(base.env)
    if layout.dispatcher != "hybridep":
        env = {name: value for name, value in env.items() if name not in _HYBRIDEP_VARIABLES}
    else:
        group = layout.expert * layout.widths.expert_tensor
        env[HYBRIDEP_DOMAIN] = str(min(group, system.nvlink_domain_gpus, HYBRIDEP_MAX_DOMAIN))
        env.setdefault("NVLINK_DOMAIN_SIZE", str(system.nvlink_domain_gpus))
        env.setdefault("USE_MNNVL", str(int(system.nvlink_domain_gpus > system.gpus_per_node)))
    # before Blackwell one connection orders tensor and context collectives, and would serialise all others
    is_hopper = system.gpu is not None and system.gpu.architecture == "hopper"
    is_split = layout.widths.tensor > 1 or layout.context.size > 1
    if is_hopper and is_split and not layout.overlaps_experts and not layout.sharding.is_fsdp:
        env[CONNECTIONS] = "1"
    elif (is_hopper or layout.sharding.is_fsdp) and env.get(CONNECTIONS, "1" if is_hopper else "") == "1":
        env[CONNECTIONS] = _MANY_CONNECTIONS
    return env
