"""The layouts that a search looks at: the values of every axis, as a base recipe and its GPUs allow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from moe_bench.projection.search.layout import (
    Axis,
    Context,
    ContextComm,
    DataSharding,
    FsdpStrategy,
    Layout,
    Sharding,
    Widths,
    recipe_of,
)
from moe_bench.projection.search.splits import Split, splits
from moe_bench.spec.recipe import Dispatcher, Recipe, Recompute, RecomputeModule

LARGEST_TENSOR = 8
MICRO_BATCH_SIZES = (1, 2, 4)
FEWEST_TOKENS_PER_CONTEXT_RANK = 4096
FSDP_INSTANCES = (2, 4, 8)
"""Groups that each hold all weights, which is what Megatron-FSDP gathers in every micro batch."""
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A base recipe and the values of every axis."""

    base: Recipe
    widths: tuple[Widths, ...]
    contexts: tuple[Context, ...]
    micro_batch_sizes: tuple[int, ...]
    overlaps: tuple[bool, ...]
    experts: tuple[int, ...]
    dispatchers: tuple[Dispatcher, ...]
    recomputes: tuple[Recompute, ...]
    shardings: tuple[Sharding, ...]
    splits: tuple[Split, ...]

    @property
    def axes(self) -> tuple[Sequence[Any], ...]:
        """Values by `Axis`."""
        return (
            self.widths, self.contexts, self.micro_batch_sizes, self.overlaps, self.experts,
            self.dispatchers, self.recomputes, self.shardings, self.splits,
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
            self.shardings[indices[Axis.SHARDING]],
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
    moe = base.model.moe
    num_experts = 1 if moe is None else moe.common_num_experts
    experts = [size for size in _divisors(num_experts) if size <= num_gpus]

    def values[Value](key: str, own: Value, searched: Sequence[Value]) -> tuple[Value, ...]:
        return (own,) if key in pinned else tuple(searched)

    return Space(
        base=base,
        widths=_widths(base, pinned),
        contexts=_contexts(base, pinned),
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
        shardings=_shardings(base, pinned),
        splits=_splits(base, pinned),
    )


def _widths(base: Recipe, pinned: frozenset[str]) -> tuple[Widths, ...]:
    """Inside an NVLink domain; experts are divided independently of the rest (arXiv:2504.14960)."""
    parallel = base.parallel
    most = min(LARGEST_TENSOR, parallel.num_gpus, base.system.nvlink_domain_gpus)
    sizes = [1 << power for power in range(most.bit_length())]
    tensors = [parallel.tensor] if "parallel.tensor" in pinned else sizes
    experts = sizes if base.model.moe is not None else [1]
    if "parallel.expert_tensor" in pinned:
        experts = [parallel.expert_tensor]
    return tuple(Widths(size, expert) for size in tensors for expert in experts)


def _contexts(base: Recipe, pinned: frozenset[str]) -> tuple[Context, ...]:
    """Every size with each kind of communication; one context rank has none."""
    parallel = base.parallel
    most = max(1, base.seq_len // FEWEST_TOKENS_PER_CONTEXT_RANK)
    sizes = [1 << power for power in range(parallel.num_gpus.bit_length()) if 1 << power <= most]
    if "parallel.context" in pinned:
        sizes = [parallel.context]
    comms: tuple[ContextComm, ...] = get_args(ContextComm)
    if "parallel.context_comm" in pinned:
        comms = (parallel.context_comm,)
    return tuple(
        Context(size, comm) for size in sizes for comm in (comms if size > 1 else (parallel.context_comm,))
    )


def _shardings(base: Recipe, pinned: frozenset[str]) -> tuple[Sharding, ...]:
    """The distributed optimizer, Megatron-FSDP in its three strategies, and what the base has.

    The distributed optimizer comes first: no layer takes less time under another sharding.
    """
    own = base.parallel
    kinds: tuple[DataSharding, ...] = ("distributed_optimizer", own.data_sharding, "megatron_fsdp")
    if "parallel.data_sharding" in pinned:
        kinds = (own.data_sharding,)
    strategies: tuple[FsdpStrategy, ...] = get_args(FsdpStrategy)
    if "parallel.fsdp_strategy" in pinned:
        strategies = (own.fsdp_strategy,)
    instances: tuple[int, ...] = (own.num_optimizer_instances,)
    hybrid = instances
    if "parallel.num_optimizer_instances" not in pinned:
        instances = tuple(dict.fromkeys((1, *instances)))
        hybrid = tuple(dict.fromkeys((*instances, *(n for n in FSDP_INSTANCES if n <= own.num_gpus))))
    return tuple(
        Sharding(kind, strategy, number)
        for kind in dict.fromkeys(kinds)
        for strategy in (strategies if kind == "megatron_fsdp" else (own.fsdp_strategy,))
        for number in (hybrid if (kind, strategy) == ("megatron_fsdp", "optim_grads_params") else instances)
    )


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
