"""A lower bound on the memory of many layouts at once: states, inputs, and activations of the warm-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.fsdp_memory import fsdp_in_flight
from moe_bench.analysis.memory import gradients_bytes, inputs_bytes, optimizer_bytes, weights_bytes
from moe_bench.analysis.params import Part, RankParams, rank_weights
from moe_bench.projection.pricing import Floats
from moe_bench.projection.search.bound import Family
from moe_bench.projection.search.layout import Axis, Widths
from moe_bench.projection.search.space import Space
from moe_bench.projection.search.splits import Split
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe

_STATE_AXES = (Axis.WIDTHS, Axis.EXPERT, Axis.SHARDING)
_PARAMS = 10**12
"""Parameters of a made-up rank, so many that rounding up to whole shards vanishes in bytes per parameter."""


@dataclass(frozen=True, slots=True)
class _Holding:
    """What the chunks of one split hold, by kind: dense layers, expert layers, prediction modules, loss."""

    split: Split
    counts: Floats
    """[chunk, kind]"""
    weights: tuple[tuple[int, int, int, int], ...]
    """Of each pipeline rank: dense weights that tensor parallelism divides and repeats, and experts' so."""


class MemoryBound:
    """Lower bounds for the layouts of one space, on the fullest pipeline rank."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self._known_states: dict[tuple[int, ...], Floats] = {}
        model = space.base.model
        kinds = [model.is_moe_layer(layer) for layer in range(model.num_layers)]
        self._layers = tuple((kinds.index(one),) if one in kinds else () for one in (False, True))
        first = tuple(0 for _ in space.sizes)
        self._holdings = [
            _holding(space.recipe((*first[:-1], index)), split) for index, split in enumerate(space.splits)
        ]

    def of_group(self, families: Sequence[Family], splits: Sequence[int]) -> Floats:
        """[family, split] bytes for families that agree on widths, context, micro batch and overlap."""
        space = self._space
        kinds = dict.fromkeys(map(self._kept_alike, families))
        kept_by = {kind: _kept_bytes(space.recipe((*kind, splits[0])), self._layers) for kind in kinds}
        kept = np.array([kept_by[self._kept_alike(family)] for family in families])
        states_by = {tuple(family[axis] for axis in _STATE_AXES): family for family in families}
        rows = {key: row for row, key in enumerate(states_by)}
        row_of = [rows[tuple(family[axis] for axis in _STATE_AXES)] for family in families]
        found = np.empty((len(families), len(splits)))
        for column, split in enumerate(splits):
            alone = space.recipe((*families[0], split))
            states = np.array([self._states(family, split) for family in states_by.values()])
            held = kept @ _held(alone, self._holdings[split]).T
            found[:, column] = (states[row_of] + held).max(1) + inputs_bytes(alone)
        return found

    def _kept_alike(self, family: Family) -> Family:
        """The first family that keeps the same: torch's experts alone depend on who shards them."""
        if not self._space.base.kernels.is_torch_native:
            return (*family[: Axis.SHARDING], 0)
        shardings = self._space.shardings
        own = shardings[family[Axis.SHARDING]].data_sharding
        first = next(index for index, one in enumerate(shardings) if one.data_sharding == own)
        return (*family[: Axis.SHARDING], first)

    def _states(self, family: Family, index: int) -> Floats:
        """[pipeline rank] bytes of weights, gradients and optimizer, quantized copies left out, and of what
        Megatron-FSDP, which has no pipelines, holds whole for a while.
        """
        key = (*(family[axis] for axis in _STATE_AXES), index)
        if key not in self._known_states:
            self._known_states[key] = self._new_states(family, index)
        return self._known_states[key]

    def _new_states(self, family: Family, index: int) -> Floats:
        recipe = self._space.recipe((*family, index))
        widths: Widths = self._space.widths[family[Axis.WIDTHS]]
        dense = _state_bytes(recipe, RankParams(dense=_PARAMS, expert=0)) / _PARAMS
        expert = _state_bytes(recipe, RankParams(dense=0, expert=_PARAMS)) / _PARAMS
        states = np.array(
            [
                dense * (divided // widths.tensor + repeated)
                + expert * ((experts // widths.expert_tensor + repeated_experts) // recipe.parallel.expert)
                for divided, repeated, experts, repeated_experts in self._holdings[index].weights
            ]
        )
        if len(states) > 1 or not self._space.shardings[family[Axis.SHARDING]].divides_weights:
            return states
        whole: Floats = states + sum(fsdp_in_flight(recipe, recipe.chunks()))
        return whole


def _holding(recipe: Recipe, split: Split) -> _Holding:
    model = recipe.model
    chunks = recipe.chunks()
    counts = []
    for chunk in chunks:
        num_moe = sum(map(model.is_moe_layer, chunk.layers))
        counts.append((len(chunk.layers) - num_moe, num_moe, chunk.num_mtp_layers, chunk.has_loss))
    return _Holding(
        split=split,
        counts=np.array(counts, dtype=float),
        weights=tuple(_divisible_weights(recipe, rank) for rank in range(split.pipeline)),
    )


def _divisible_weights(recipe: Recipe, pipeline_rank: int) -> tuple[int, int, int, int]:
    parts = dict(rank_weights(recipe, pipeline_rank))
    experts = parts.pop(Part.ROUTED_EXPERTS, None)
    divided = sum(weights.sharded for weights in parts.values())
    repeated = sum(weights.replicated for weights in parts.values())
    if experts is None:
        return divided, repeated, 0, 0
    return divided, repeated, experts.sharded, experts.replicated


def _state_bytes(recipe: Recipe, params: RankParams) -> int:
    return weights_bytes(recipe, params) + gradients_bytes(recipe, params) + optimizer_bytes(recipe, params)


def _kept_bytes(recipe: Recipe, layers: Sequence[tuple[int, ...]]) -> tuple[int, int, int, int]:
    """What one micro batch keeps of each kind until its backward pass; `layers` are one dense and one of
    experts, none where there is none.

    Nothing where several layers are recomputed together, or some layers and not others are recomputed or sent
    to the host: kinds do not add up there.
    """
    recompute = recipe.recompute
    if recipe.offload.num_activation_layers:
        return 0, 0, 0, 0
    if recompute.granularity == "full" and (recompute.method == "block" or recompute.num_layers != 1):
        return 0, 0, 0, 0
    memory = ModelMemory(recipe)
    chunks = [(layer, 0, False) for layer in layers] + [
        ((), min(1, recipe.num_mtp_layers), False),
        ((), 0, True),
    ]
    dense, moe, mtp, loss = (
        memory.chunk(
            Chunk(
                pipeline_rank=0,
                virtual_stage=0,
                layers=layer,
                has_embedding=False,
                has_loss=has_loss,
                num_mtp_layers=num_mtp,
            )
        ).kept_bytes
        if layer or num_mtp or has_loss
        else 0
        for layer, num_mtp, has_loss in chunks
    )
    return dense, moe, mtp, loss


def _held(recipe: Recipe, holding: _Holding) -> Floats:
    """[pipeline rank, kind]: how many of each kind wait for their backward pass when the warm-up is over."""
    pipeline, virtual = holding.split.pipeline, holding.split.virtual_pipeline
    in_flight = np.array([_in_flight(recipe, rank) for rank in range(pipeline)])
    by_rank = holding.counts.reshape(virtual, pipeline, -1)
    held: Floats = np.einsum("rv,vrk->rk", in_flight, by_rank)
    return held


def _in_flight(recipe: Recipe, rank: int) -> list[int]:
    """Micro batches of each chunk of a rank, as analysis/schedule_memory.py walks the schedules.

    1F1B: min(m, PP - rank). Interleaved: the warm-up's 2 (PP - rank - 1) + (VPP - 1) G passes in groups of G,
    and one more, which where passes are merged runs beside a backward pass already.
    """
    parallel, num = recipe.parallel, recipe.num_micro_batches
    if parallel.virtual_pipeline == 1:
        return [min(num, parallel.pipeline - rank)]
    group = parallel.micro_batch_group_size or parallel.pipeline
    virtual = parallel.virtual_pipeline
    num_warmup = 2 * (parallel.pipeline - rank - 1) + (virtual - 1) * group + 1
    num_passes = min(num_warmup, num * virtual)
    whole, left = divmod(num_passes, group * virtual)
    return [whole * group + min(max(left - chunk * group, 0), group) for chunk in range(virtual)]
