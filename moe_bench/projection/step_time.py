"""Seconds of whole steps, many at once: layers on ranks, pipeline, data parallelism, optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from moe_bench.projection.constants import Constants
from moe_bench.projection.fabric import LinkTime
from moe_bench.projection.layer_time import LayerTimes, layer_times
from moe_bench.projection.pricing import Floats, Ints, LayerTable, stack
from moe_bench.projection.step_work import StepWork, SyncWork

_HIDDEN_TRANSFER = 0.3
"""Share of a transfer that stays exposed where it runs beside computation (`overlap.p2p`)."""
_FSDP_LEAK = 0.15
"""Share of the shorter of computation and gathering that Megatron-FSDP leaves exposed."""
_OPTIMIZER_START_S = 5e-3
"""Launches, gradient norm across ranks, and what else happens once between two steps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTable:
    """Many recipes as columns. A rank is one pipeline rank of one recipe."""

    layers: LayerTable
    rank_of_count: Ints
    layer_of_count: Ints
    number_of_count: Floats
    """Rank r holds `number` layers of kind `layer`."""
    first_rank: Ints
    """[recipe] index of its first rank; ranks of a recipe stand together."""
    num_ranks: Ints
    num_micro_batches: Floats
    num_virtual: Floats
    num_gpus: Floats
    transfer_s: Floats
    """[recipe, nvlink | nic | latency]"""
    overlaps_transfer: Floats
    gradients_s: Floats
    parameters_s: Floats
    gathers_s: Floats
    """[recipe, nvlink | nic | latency], the same for what each micro batch gathers."""
    gradient_buckets: Floats
    parameter_buckets: Floats
    overlaps_gradients: Floats
    overlaps_parameters: Floats
    to_host_s: Floats
    from_host_s: Floats
    """[recipe] copies of one micro batch's offloaded activations."""
    scaling_s: Floats
    optimizer_memory_s: Floats
    schedule_factor: Floats
    """Simulated pipeline time over the closed form's; 1 where there is no pipeline."""
    gradient_window_s: Floats
    parameter_window_s: Floats
    """Time in which the simulated pipeline hides that traffic; NaN: one micro batch's pass of the rank."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Columns over recipes, in seconds."""

    layers: LayerTimes
    rank_busy_s: Floats
    """[rank, direction]: one micro batch through all chunks of the rank."""
    critical_rank: Ints
    """[recipe] index of the busiest rank."""
    busy_s: Floats
    """The busiest rank's micro batches, without waiting."""
    bubble_s: Floats
    """What the pipeline adds to that, transfers apart."""
    transfer_s: Floats
    gathers_s: Floats
    offload_s: Floats
    scaling_s: Floats
    gradients_s: Floats
    parameters_s: Floats
    optimizer_s: Floats
    straggler_s: Floats

    @property
    def step_s(self) -> Floats:
        """The whole step: the sum of the terms."""
        total: Floats = (
            self.busy_s
            + self.bubble_s
            + self.transfer_s
            + self.gathers_s
            + self.offload_s
            + self.scaling_s
            + self.gradients_s
            + self.parameters_s
            + self.optimizer_s
            + self.straggler_s
        )
        return total


def step_table(works: Sequence[StepWork], *, schedule_factor: Floats | None = None) -> StepTable:
    """`works` as columns."""
    first_layer = np.cumsum([0, *(len(work.layers) for work in works)])
    pipeline = np.array([work.recipe.parallel.pipeline for work in works])
    first_rank = np.cumsum([0, *pipeline])
    counts = [
        (first_rank[row] + work.lowered.chunks[chunk].pipeline_rank, first_layer[row] + layer, number)
        for row, work in enumerate(works)
        for chunk, layers in enumerate(work.chunk_counts)
        for layer, number in layers.items()
    ]
    recipes = [work.recipe for work in works]
    ranks, layers, numbers = zip(*counts, strict=True)
    return StepTable(
        layers=stack([layer for work in works for layer in work.layers]),
        rank_of_count=np.array(ranks),
        layer_of_count=np.array(layers),
        number_of_count=np.array(numbers, dtype=float),
        first_rank=first_rank[:-1],
        num_ranks=pipeline,
        num_micro_batches=_column(recipe.num_micro_batches for recipe in recipes),
        num_virtual=_column(recipe.parallel.virtual_pipeline for recipe in recipes),
        num_gpus=_column(recipe.parallel.num_gpus for recipe in recipes),
        transfer_s=_links([[work.transfer] for work in works]),
        overlaps_transfer=_column(recipe.overlap.p2p for recipe in recipes),
        gradients_s=_syncs(work.gradients for work in works),
        parameters_s=_syncs(work.parameters for work in works),
        gathers_s=_syncs(work.micro_batch_gathers for work in works),
        gradient_buckets=_column(work.gradients.num_buckets for work in works),
        parameter_buckets=_column(work.parameters.num_buckets for work in works),
        overlaps_gradients=_column(recipe.overlap.grad_reduce for recipe in recipes),
        overlaps_parameters=_column(recipe.overlap.param_gather for recipe in recipes),
        to_host_s=_column(work.offload.to_host_s for work in works),
        from_host_s=_column(work.offload.from_host_s for work in works),
        scaling_s=_column(work.scaling_s for work in works),
        optimizer_memory_s=_column(work.optimizer_memory_s for work in works),
        schedule_factor=np.ones(len(works)) if schedule_factor is None else schedule_factor,
        gradient_window_s=np.full(len(works), np.nan),
        parameter_window_s=np.full(len(works), np.nan),
    )


def step_times(table: StepTable, constants: Constants) -> StepTimes:
    """Every term of every recipe's step."""
    layers = layer_times(table.layers, constants)
    rank_busy_s = _rank_busy(table, layers)
    busy = rank_busy_s.sum(1)
    slowest = np.maximum.reduceat(busy, table.first_rank)
    mean = np.add.reduceat(busy, table.first_rank) / table.num_ranks
    transfer = _transfers(table, constants)
    busy_s = table.num_micro_batches * slowest
    transfer_s = table.num_micro_batches * transfer
    fill = (table.num_ranks - 1) / table.num_virtual * (mean + transfer / table.num_virtual)
    pipeline_s = table.schedule_factor * (busy_s + transfer_s + fill)
    critical = _critical_ranks(table, busy)
    forward, backward = rank_busy_s[critical, 0], rank_busy_s[critical, 1]
    gathers_s = exposed_gathers_s(table, constants, busy_s=slowest)
    offload_s = table.num_micro_batches * (
        np.maximum(table.to_host_s - forward, 0) + np.maximum(table.from_host_s - backward, 0)
    )
    gradients_s = _synced(
        table.gradients_s,
        table.overlaps_gradients,
        np.where(np.isnan(table.gradient_window_s), backward, table.gradient_window_s),
        table.gradient_buckets,
        constants,
    )
    parameters_s = _synced(
        table.parameters_s,
        table.overlaps_parameters,
        np.where(np.isnan(table.parameter_window_s), forward, table.parameter_window_s),
        table.parameter_buckets,
        constants,
    )
    optimizer_s = table.optimizer_memory_s / constants.stream_fraction + _OPTIMIZER_START_S
    inside_s = pipeline_s + gathers_s + offload_s + table.scaling_s
    together = inside_s + gradients_s + parameters_s + optimizer_s
    return StepTimes(
        layers=layers,
        rank_busy_s=rank_busy_s,
        critical_rank=critical,
        busy_s=busy_s,
        bubble_s=pipeline_s - busy_s - transfer_s,
        transfer_s=transfer_s,
        gathers_s=gathers_s,
        offload_s=offload_s,
        scaling_s=table.scaling_s,
        gradients_s=gradients_s,
        parameters_s=parameters_s,
        optimizer_s=optimizer_s,
        straggler_s=together * constants.straggler_std * np.sqrt(2 * np.log(table.num_gpus)),
    )


def _rank_busy(table: StepTable, layers: LayerTimes) -> Floats:
    """[rank, direction]: layers of each kind times their seconds."""
    total = layers.total_s[table.layer_of_count] * table.number_of_count[:, None]
    num_ranks = int(table.num_ranks.sum())
    return np.stack(
        [np.bincount(table.rank_of_count, total[:, way], minlength=num_ranks) for way in (0, 1)], axis=1
    )


def _critical_ranks(table: StepTable, busy: Floats) -> Ints:
    ends = table.first_rank + table.num_ranks
    return np.array(
        [first + int(np.argmax(busy[first:end])) for first, end in zip(table.first_rank, ends, strict=True)]
    )


def _transfers(table: StepTable, constants: Constants) -> Floats:
    """Hidden states and gradients of one micro batch that a rank waits for: 2 per chunk."""
    seconds = 2 * table.num_virtual * link_seconds(table.transfer_s, constants)
    exposed: Floats = seconds * np.where(table.overlaps_transfer > 0, _HIDDEN_TRANSFER, 1.0)
    return exposed


def exposed_gathers_s(table: StepTable, constants: Constants, *, busy_s: Floats) -> Floats:
    """[recipe] what gathering weights adds to C seconds of every micro batch: max(C, A) + leak min - C."""
    traffic = link_seconds(table.gathers_s, constants)
    exposed = np.maximum(traffic - busy_s, 0) + _FSDP_LEAK * np.minimum(traffic, busy_s)
    whole: Floats = table.num_micro_batches * np.where(traffic > 0, exposed, 0.0)
    return whole


def _synced(
    links_s: Floats, overlaps: Floats, window_s: Floats, num_buckets: Floats, constants: Constants
) -> Floats:
    """Exposed part of a step's collectives: all of it, or what the window of the last (or first) micro batch
    leaves, and at least one bucket.
    """
    seconds = link_seconds(links_s, constants)
    left = np.maximum(seconds - window_s, seconds / num_buckets)
    exposed: Floats = np.where(overlaps > 0, left, seconds)
    return exposed


def link_seconds(links_s: Floats, constants: Constants) -> Floats:
    """[recipe, nvlink | nic | latency] to seconds of each recipe, were nothing to hide them."""
    nvlink, nic = links_s[:, 0] / constants.nvlink_fraction, links_s[:, 1] / constants.dp_nic_fraction
    seconds: Floats = np.maximum(nvlink, nic) + links_s[:, 2]
    return seconds


def _links(rows: Sequence[Sequence[LinkTime]]) -> Floats:
    return np.array(
        [
            [
                sum(time.nvlink_s for time in times),
                sum(time.nic_s for time in times),
                sum(time.latency_s for time in times),
            ]
            for times in rows
        ]
    )


def _syncs(works: Iterable[SyncWork]) -> Floats:
    return _links([work.times for work in works])


def _column(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
