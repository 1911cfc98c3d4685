"""The layouts that a search looks at: values on nine axes, and the recipe that each combination makes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, NamedTuple

from moe_bench.projection.search.splits import Split, splits
from moe_bench.spec.legality.dispatch import HYBRIDEP_DOMAIN, HYBRIDEP_MAX_DOMAIN
from moe_bench.spec.legality.sharding import CONNECTIONS
from moe_bench.spec.recipe import Dispatcher, Recipe, Recompute, RecomputeModule

LARGEST_TENSOR = 8
MICRO_BATCH_SIZES = (1, 2, 4)
FEWEST_TOKENS_PER_CONTEXT_RANK = 4096
_SEARCHED_DISPATCHERS: tuple[Dispatcher, ...] = ("alltoall", "deepep", "hybridep")
_RECOMPUTED: tuple[tuple[RecomputeModule, ...], ...] = (
    ("moe_act",),
    ("layernorm", "moe_act"),
    ("mla_up_proj",),
    ("mla_up_proj", "mlp"),
    ("mla_up_proj", "layernorm", "moe_act"),
    ("mla_up_proj", "mlp", "layernorm", "moe_act"),
    ("layernorm", "moe"),
    ("mla_up_proj", "mlp", "layernorm", "moe"),
    ("layernorm", "mlp"),
)
"""The sets of the recipes of Megatron-Bridge, Megatron-LM and ModelZoo; what a model lacks is left out."""
_HYBRIDEP_VARIABLES = (
    HYBRIDEP_DOMAIN, "NVLINK_DOMAIN_SIZE", "USE_MNNVL", "NUM_OF_TOKENS_PER_CHUNK_COMBINE_API",
)  # fmt: skip
_HYBRIDEP_FIELDS = ("moe_permute_fusion_into_hybridep", "moe_hybridep_num_sms_preprocessing")


class Widths(NamedTuple):
    """Tensor parallelism of the dense part and of experts."""

    tensor: int
    expert_tensor: int


class Layout(NamedTuple):
    """One value of each axis."""

    widths: Widths
    context: int
    micro_batch_size: int
    overlaps_experts: bool
    expert: int
    dispatcher: Dispatcher
    recompute: Recompute
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
    SPLIT = 7


AXES_OF_FIELD: Mapping[str, tuple[Axis, ...]] = {
    "parallel.tensor": (Axis.WIDTHS,),
    "parallel.expert_tensor": (Axis.WIDTHS,),
    "parallel.sequence_parallel": (Axis.WIDTHS,),
    "parallel.context": (Axis.CONTEXT,),
    "parallel.expert": (Axis.EXPERT,),
    "parallel.pipeline": (Axis.SPLIT,),
    "parallel.virtual_pipeline": (Axis.SPLIT,),
    "parallel.layout": (Axis.SPLIT,),
    "micro_batch_size": (Axis.MICRO_BATCH,),
    "recompute": (Axis.RECOMPUTE,),
    "dispatch": (Axis.DISPATCHER,),
    "overlap.expert_parallel": (Axis.OVERLAP,),
    "overlap.delayed_wgrad": (Axis.OVERLAP,),
    "overlap.shared_experts": (Axis.OVERLAP,),
    "overlap.tensor_parallel": (Axis.WIDTHS,),
    "overlap.p2p": (Axis.SPLIT,),
    "overlap.align_param_gather": (Axis.SPLIT,),
    "overlap.param_gather_with_optimizer_step": (Axis.SPLIT,),
    "cuda_graphs": (Axis.RECOMPUTE,),
    "mcore": (Axis.DISPATCHER,),
    "env": (Axis.WIDTHS, Axis.CONTEXT, Axis.OVERLAP, Axis.EXPERT, Axis.DISPATCHER),
}
"""Fields of a recipe that `recipe_of` changes, and the axes that decide each; all others are the base's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A base recipe and the values of every axis."""

    base: Recipe
    widths: tuple[Widths, ...]
    contexts: tuple[int, ...]
    micro_batch_sizes: tuple[int, ...]
    overlaps: tuple[bool, ...]
    experts: tuple[int, ...]
    dispatchers: tuple[Dispatcher, ...]
    recomputes: tuple[Recompute, ...]
    splits: tuple[Split, ...]

    @property
    def axes(self) -> tuple[Sequence[Any], ...]:
        """Values by `Axis`."""
        return (
            self.widths, self.contexts, self.micro_batch_sizes, self.overlaps, self.experts,
            self.dispatchers, self.recomputes, self.splits,
        )  # fmt: skip

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many values each axis has."""
        return tuple(len(axis) for axis in self.axes)

    @property
    def num_layouts(self) -> int:
        """All combinations, legal or not."""
        return math.prod(self.sizes)

    def layout(self, indices: Sequence[int]) -> Layout:
        """The combination with these indices, one per axis."""
        return Layout(
            self.widths[indices[Axis.WIDTHS]],
            self.contexts[indices[Axis.CONTEXT]],
            self.micro_batch_sizes[indices[Axis.MICRO_BATCH]],
            self.overlaps[indices[Axis.OVERLAP]],
            self.experts[indices[Axis.EXPERT]],
            self.dispatchers[indices[Axis.DISPATCHER]],
            self.recomputes[indices[Axis.RECOMPUTE]],
            self.splits[indices[Axis.SPLIT]],
        )

    def recipe(self, indices: Sequence[int]) -> Recipe:
        """The recipe with these indices, one per axis."""
        return recipe_of(self.base, self.layout(indices))


def search_space(
    base: Recipe,
    *,
    micro_batch_sizes: Sequence[int] = MICRO_BATCH_SIZES,
    pinned: frozenset[str] = frozenset(),
) -> Space:
    """Every value that makes sense for `base` and its number of GPUs; legality decides on combinations.

    `pinned` are fields of the recipe, such as `parallel.tensor`, that keep the base's value.
    """
    parallel = base.parallel
    num_gpus = parallel.num_gpus
    most_contexts = max(1, base.seq_len // FEWEST_TOKENS_PER_CONTEXT_RANK)
    contexts = [1 << power for power in range(num_gpus.bit_length()) if 1 << power <= most_contexts]
    moe = base.model.moe
    num_experts = 1 if moe is None else moe.common_num_experts
    experts = [size for size in _divisors(num_experts) if size <= num_gpus]

    def values[Value](key: str, own: Value, searched: Sequence[Value]) -> tuple[Value, ...]:
        return (own,) if key in pinned else tuple(searched)

    return Space(
        base=base,
        widths=_widths(base, pinned),
        contexts=values("parallel.context", parallel.context, contexts),
        micro_batch_sizes=values("micro_batch_size", base.micro_batch_size, micro_batch_sizes),
        overlaps=values(
            "overlap.expert_parallel",
            base.overlap.expert_parallel,
            (False,) if moe is None else (False, True),
        ),
        experts=values("parallel.expert", parallel.expert, experts),
        dispatchers=values("dispatch.dispatcher", base.dispatch.dispatcher, _dispatchers(base)),
        recomputes=(base.recompute,)
        if any(key.startswith("recompute") for key in pinned)
        else _recomputes(base),
        splits=_splits(base, pinned),
    )


def _widths(base: Recipe, pinned: frozenset[str]) -> tuple[Widths, ...]:
    """Experts whole, or as thin as the rest."""
    parallel = base.parallel
    most = min(LARGEST_TENSOR, parallel.num_gpus, base.system.nvlink_domain_gpus)
    tensors = [1 << power for power in range(most.bit_length())]
    if "parallel.tensor" in pinned:
        tensors = [parallel.tensor]
    if "parallel.expert_tensor" in pinned:
        return tuple(Widths(size, parallel.expert_tensor) for size in tensors)
    return tuple(Widths(size, expert) for size in tensors for expert in dict.fromkeys((1, size)))


def recipe_of(base: Recipe, layout: Layout) -> Recipe:
    """`base` in another layout; what follows from a layout follows, everything else stays."""
    split, widths = layout.split, layout.widths
    has_virtual = split.virtual_pipeline > 1
    overlap = base.overlap
    uses_hybridep = layout.dispatcher == "hybridep"
    num_sms = base.dispatch.num_sms if layout.dispatcher == base.dispatch.dispatcher else None
    return base.model_copy(
        update={
            "parallel": base.parallel.model_copy(
                update={
                    "tensor": widths.tensor,
                    "expert_tensor": widths.expert_tensor,
                    "sequence_parallel": widths.tensor > 1,
                    "context": layout.context,
                    "expert": layout.expert,
                    "pipeline": split.pipeline,
                    "virtual_pipeline": split.virtual_pipeline,
                    "layout": split.layout,
                }
            ),
            "micro_batch_size": layout.micro_batch_size,
            "recompute": layout.recompute,
            "dispatch": base.dispatch.model_copy(
                update={"dispatcher": layout.dispatcher, "num_sms": num_sms}
            ),
            "overlap": overlap.model_copy(
                update={
                    "expert_parallel": layout.overlaps_experts,
                    "delayed_wgrad": overlap.delayed_wgrad and layout.overlaps_experts,
                    "shared_experts": overlap.shared_experts and not layout.overlaps_experts,
                    "tensor_parallel": overlap.tensor_parallel and widths.tensor > 1,
                    "p2p": has_virtual,
                    "align_param_gather": overlap.align_param_gather and has_virtual,
                    "param_gather_with_optimizer_step": overlap.param_gather_with_optimizer_step
                    and has_virtual,
                }
            ),
            "cuda_graphs": _graphs(base, layout.recompute),
            "env": _env(base, layout),
            "mcore": base.mcore
            if uses_hybridep
            else {name: value for name, value in base.mcore.items() if name not in _HYBRIDEP_FIELDS},
        }
    )


def _graphs(base: Recipe, recompute: Recompute) -> object:
    """The base's; none of layers that are recomputed as a whole, which cannot be captured alone."""
    graphs = base.cuda_graphs
    is_by_layer = graphs.implementation in ("local", "transformer_engine")
    return type(graphs)() if is_by_layer and recompute.granularity == "full" else graphs


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
    if system.gpu is None or system.gpu.architecture != "hopper":
        return env
    # before Blackwell one connection orders tensor and context collectives, and would serialise all others
    is_ordered = (layout.widths.tensor > 1 or layout.context > 1) and not layout.overlaps_experts
    if is_ordered and base.parallel.data_sharding != "megatron_fsdp":
        env[CONNECTIONS] = "1"
    elif env.get(CONNECTIONS, "1") == "1":
        env[CONNECTIONS] = "32"
    return env


def _dispatchers(base: Recipe) -> tuple[Dispatcher, ...]:
    own = base.dispatch.dispatcher
    return (own,) if base.model.moe is None else tuple(dict.fromkeys((own, *_SEARCHED_DISPATCHERS)))


def _recomputes(base: Recipe) -> tuple[Recompute, ...]:
    model, moe = base.model, base.model.moe
    missing = {
        "mla_up_proj": model.attention.kind != "mla",
        "mlp": model.num_dense_layers == 0,
        "moe": moe is None,
        "moe_act": moe is None,
    }
    found = [Recompute(), base.recompute]
    for modules in _RECOMPUTED:
        kept = tuple(module for module in modules if not missing.get(module, False))
        if kept:
            found.append(Recompute(granularity="selective", modules=kept))
    found.append(Recompute(granularity="full", method="uniform", num_layers=1))
    distinct = {(one.granularity, frozenset(one.modules), one.method, one.num_layers): one for one in found}
    return tuple(distinct.values())


def _splits(base: Recipe, pinned: frozenset[str]) -> tuple[Split, ...]:
    parallel = base.parallel
    own = Split(parallel.pipeline, parallel.virtual_pipeline, parallel.layout)
    if "parallel.layout" in pinned:
        return (own,)
    pipelines = (
        (parallel.pipeline,)
        if "parallel.pipeline" in pinned
        else tuple(size for size in _divisors(parallel.num_gpus) if size <= base.model.num_layers)
    )
    found = splits(base, pipelines)
    if "parallel.virtual_pipeline" in pinned:
        found = tuple(split for split in found if split.virtual_pipeline == parallel.virtual_pipeline)
    return found


def _divisors(number: int) -> tuple[int, ...]:
    return tuple(size for size in range(1, number + 1) if number % size == 0)
