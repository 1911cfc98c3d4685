"""A lower bound on the projected step time of many layouts at once, from the layers alone.

For every pipeline rank r and one micro batch's time in each chunk,

    step >= (1 + s) max_r (sum_{i<r} F_i + m sum_v (F + B)_{r + v PP} + sum_{i<r} B_i)

since rank r starts when a micro batch has come through the chunks before its first one, does all its own
work, and the last gradient still has to go back through them; s is the straggler's share. Where passes of two
micro batches are merged, F and B are their shares of a merged slot, which never exceed their time alone
(schedule.merged_s). Transfers only add to that, and so do data parallelism and the optimizer, whose share
`with_traffic_s` bounds: collectives that nothing hides, one bucket of those that something may hide, and of
what Megatron-FSDP gathers in every micro batch all that these layers cannot hide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from moe_bench.projection.constants import Constants
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.fabric import Fabric
from moe_bench.projection.layer_time import LayerTimes, layer_times
from moe_bench.projection.pricing import Floats, LayerSetting, PricedLayer, Pricer, stack
from moe_bench.projection.schedule.choice import schedule_kind
from moe_bench.projection.search.layout import Axis, Layout, recipe_of
from moe_bench.projection.search.space import Space
from moe_bench.projection.search.splits import Split
from moe_bench.projection.step_time import StepTable, exposed_gathers_s, link_seconds, step_table
from moe_bench.projection.step_work import StepWork, layer_setting, step_work
from moe_bench.projection.work.load import recipe_load
from moe_bench.projection.work.lowering import ChunkWork, LayerKind, lower
from moe_bench.spec.recipe import Recipe, Recompute

_ONCE_AXES = (Axis.WIDTHS, Axis.CONTEXT, Axis.MICRO_BATCH, Axis.EXPERT, Axis.SHARDING, Axis.SPLIT)
"""What the traffic of weights and gradients depends on."""
Family = tuple[int, ...]
"""Indices on all axes but the last, which divides the layers."""


@dataclass(frozen=True, slots=True)
class _SplitWork:
    """How often each chunk of one split holds each kind of layer, the loss last."""

    split: Split
    counts: Floats
    """[chunk, kind]"""


class StepBound:
    """Lower bounds for the layouts of one space."""

    def __init__(self, space: Space, constants: Constants) -> None:
        """Raises BadInputError for a system without a GPU or a precision without rates."""
        self._space, self._constants = space, constants
        self._efficiency = Efficiency(space.base.system)
        self._loads: dict[Family, float] = {}
        self._known: dict[Family, Floats] = {}
        self._priced: dict[Family, list[tuple[PricedLayer, LayerSetting]]] = {}
        self._traffic: dict[tuple[int, ...], tuple[StepTable, float]] = {}
        num_gpus = space.base.parallel.num_gpus
        self._straggler = 1 + constants.straggler_std * math.sqrt(2 * math.log(num_gpus))
        first = tuple(0 for _ in space.sizes)
        kinds: dict[LayerKind, None] = {}
        chunks = []
        for index in range(len(space.splits)):
            lowered = lower(_kept(space.recipe((*first[:-1], index))))
            chunks.append(lowered.chunks)
            for kind in lowered.kinds:
                kinds[_kept_kind(kind)] = None
        self._kinds = sorted(kinds, key=repr)
        self._works = [
            _SplitWork(split, self._counts(of_split))
            for split, of_split in zip(space.splits, chunks, strict=True)
        ]

    def _counts(self, chunks: Sequence[ChunkWork]) -> Floats:
        counts = np.zeros((len(chunks), len(self._kinds) + 1))
        for row, chunk in enumerate(chunks):
            for kind, number in chunk.layers.items():
                counts[row, self._kinds.index(_kept_kind(kind))] += number
            counts[row, -1] = chunk.has_loss
        return counts

    def of_group(self, families: Sequence[Family], splits: Sequence[int]) -> Floats:
        """[family, split] seconds for families that agree on widths, context, micro batch and overlap.

        Recomputation is left out, and layers are those under the first sharding, since others only add work:
        families that differ in nothing else are priced once.
        """
        space = self._space
        cores = {core: row for row, core in enumerate(dict.fromkeys(map(_core, families)))}
        layers = []
        for core in cores:
            layout = space.layout((*core, splits[0]))
            layers += self._layers(core, recipe_of(space.base, layout._replace(recompute=Recompute())))
        bounds = self._bounds((*families[0], splits[0]), layers, splits)
        of_families: Floats = bounds[[cores[_core(family)] for family in families]]
        return of_families

    def of_family(self, family: Family) -> Floats:
        """[split] seconds of one family, recomputation included, for every split of the space."""
        family = self._like(family)
        if family not in self._known:
            recipe = _kept(self._space.recipe((*family, 0)))
            self._priced[family] = self._layers(family, recipe)
            splits = range(len(self._works))
            self._known[family] = self._bounds((*family, 0), self._priced[family], splits)[0]
        return self._known[family]

    def is_priced_alike(self, one: Family, other: Family) -> bool:
        """Whether two families asked of `of_family` differ in no time of any operation or message."""
        return all(
            mine_set == theirs_set and _is_equal(mine, theirs)
            for (mine, mine_set), (theirs, theirs_set) in zip(
                self._priced[self._like(one)], self._priced[self._like(other)], strict=True
            )
        )

    def _like(self, family: Family) -> Family:
        """The first family whose layers are the same: with weights divided as much, or none."""
        shardings = self._space.shardings
        own = shardings[family[Axis.SHARDING]]
        alike = (index for index, one in enumerate(shardings) if one.data_sharding == own.data_sharding)
        return (*family[: Axis.SHARDING], next(alike))

    def with_traffic_s(self, indices: Sequence[int], layers_s: float) -> float:
        """`layers_s`, a bound of one layout's layers, and what weights, gradients and the optimizer add."""
        key = tuple(indices[axis] for axis in _ONCE_AXES)
        if key not in self._traffic:
            work = step_work(self._space.recipe(indices), self._efficiency, load=1.0)
            self._traffic[key] = self._least_traffic(work)
        table, once_s = self._traffic[key]
        gathers_s = 0.0
        if table.num_ranks[0] == 1:
            # the layers of a lone rank are all that may hide its gathers, and both together grow with them
            busy_s = layers_s / (self._straggler * table.num_micro_batches)
            gathers_s = float(exposed_gathers_s(table, self._constants, busy_s=busy_s)[0])
        return layers_s + self._straggler * (once_s + gathers_s)

    def _least_traffic(self, work: StepWork) -> tuple[StepTable, float]:
        """A step as a table, and what happens once in it at the least."""
        table = step_table([work])
        shares = (
            (table.gradients_s, table.overlaps_gradients, table.gradient_buckets),
            (table.parameters_s, table.overlaps_parameters, table.parameter_buckets),
        )
        exposed_s = sum(
            float(link_seconds(links_s, self._constants)[0]) / (float(buckets[0]) if overlaps[0] else 1.0)
            for links_s, overlaps, buckets in shares
        )
        return table, exposed_s + work.optimizer_memory_s / self._constants.stream_fraction

    def _bounds(
        self, like: Sequence[int], layers: Sequence[tuple[PricedLayer, LayerSetting]], splits: Sequence[int]
    ) -> Floats:
        """[family, split] from the layers of every family, one family behind another."""
        forward_s, backward_s = _chunk_passes(layer_times(stack(layers), self._constants))
        num_kinds = len(self._kinds) + 1
        forward_s, backward_s = forward_s.reshape(-1, num_kinds), backward_s.reshape(-1, num_kinds)
        found = np.empty((len(forward_s), len(splits)))
        layout = self._space.layout(like)
        for column, split in enumerate(splits):
            number = num_micro_batches(self._space.base, layout._replace(split=self._space.splits[split]))
            found[:, column] = _split_bound(self._works[split], forward_s, backward_s, number)
        bounds: Floats = self._straggler * found
        return bounds

    def _layers(self, family: Family, recipe: Recipe) -> list[tuple[PricedLayer, LayerSetting]]:
        """The kinds of layers of one recipe in the order of all kinds, the loss last."""
        lowered = lower(recipe, load=self._load(family, recipe))
        pricer = Pricer(self._efficiency, Fabric(recipe.system, recipe.parallel))
        setting = layer_setting(recipe, schedule_kind(recipe))
        works = {_kept_kind(kind): work for kind, work in lowered.kinds.items()}
        ordered = (*(works[kind] for kind in self._kinds), lowered.loss)
        return [(pricer.price(work), setting) for work in ordered]

    def _load(self, family: Family, recipe: Recipe) -> float:
        key = tuple(family[axis] for axis in (Axis.WIDTHS, Axis.CONTEXT, Axis.MICRO_BATCH, Axis.EXPERT))
        if key not in self._loads:
            self._loads[key] = recipe_load(recipe)
        return self._loads[key]


def num_micro_batches(base: Recipe, layout: Layout) -> int:
    """Micro batches of a layout per step and data-parallel rank; 1 where the batch has fewer."""
    replica = layout.widths.tensor * layout.context.size * layout.split.pipeline
    data = max(1, base.parallel.num_gpus // replica)
    return max(1, base.global_batch_size // (layout.micro_batch_size * data))


def _split_bound(work: _SplitWork, forward_s: Floats, backward_s: Floats, num_micro_batches: int) -> Floats:
    """[family] from [family, kind]."""
    pipeline, virtual = work.split.pipeline, work.split.virtual_pipeline
    forward = forward_s @ work.counts.T
    backward = backward_s @ work.counts.T
    around = (forward + backward)[:, :pipeline].cumsum(1) - (forward + backward)[:, :pipeline]
    busy = (forward + backward).reshape(-1, virtual, pipeline).sum(1)
    bound: Floats = (around + num_micro_batches * busy).max(1)
    return bound


def _chunk_passes(times: LayerTimes) -> tuple[Floats, Floats]:
    """Forward and backward share of a layer in the slots of a pipeline.

    Merged passes take J in all, shared out by what each takes alone: F J / (F + B).
    """
    merged = times.total_s
    alone = merged - times.expert_s + times.expert_traffic_s
    share = merged.sum(1) / alone.sum(1)
    return alone[:, 0] * share, alone[:, 1] * share


def _is_equal(one: PricedLayer, other: PricedLayer) -> bool:
    return all(
        np.array_equal(getattr(one, field.name), getattr(other, field.name)) for field in fields(PricedLayer)
    )


def _core(family: Family) -> Family:
    """The family without its recomputation and sharding, their first values standing for all."""
    return (*family[: Axis.RECOMPUTE], 0, 0)


def _kept(recipe: Recipe) -> Recipe:
    """The recipe whose layers are all of a kind: with `block`, those that are not recomputed."""
    if recipe.recompute.granularity == "full" and recipe.recompute.method == "block":
        return recipe.model_copy(update={"recompute": Recompute()})
    return recipe


def _kept_kind(kind: LayerKind) -> LayerKind:
    return replace(kind, is_recomputed=False)
