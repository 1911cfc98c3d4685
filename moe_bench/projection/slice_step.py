"""The full run from the compute that one rank measured: modelled communication, bubble and stragglers on top.

The modelled kernels of every layer are scaled by one factor, so that the rank which was measured takes the
time that it took; the pipeline is then simulated with them, and what a slice cannot see is added as always.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from moe_bench.analysis.memory import LONE_CONTEXT_BYTES, rank_memory
from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.forecast import Basis
from moe_bench.projection.layer_time import layer_times
from moe_bench.projection.pricing import LayerTable, stack
from moe_bench.projection.step import Projection, Term, project
from moe_bench.projection.step_time import step_table, step_times
from moe_bench.projection.step_work import StepWork, step_work
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import Plan

START_S = 40.0
"""Imports, process groups of a thousand ranks, and first launches of one process: assumed, not measured."""
_INIT_BYTES_PER_S = 5e9
"""Weights drawn and copied to the optimizer's FP32 state, per byte of state: assumed, not measured."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledRank:
    """What the projection says of a rank that runs alone."""

    micro_batch_s: float
    """Kernels and launches of one micro batch, forward and backward; nothing is sent."""
    optimizer_s: float


def modelled_rank(
    recipe: Recipe, pipeline_rank: int, *, basis: Basis | None = None, load: float | None = None
) -> ModelledRank:
    """Pipeline rank `pipeline_rank` of `recipe` alone; `load` as in `project`, which raises."""
    basis = Basis() if basis is None else basis
    work = step_work(recipe, basis.efficiency(recipe.system), load=load)
    times = step_times(step_table([work]), basis.constants)
    return ModelledRank(
        micro_batch_s=_compute_s(work, pipeline_rank, basis.constants),
        optimizer_s=float(times.optimizer_s[0]),
    )


def project_from_slice(
    plan: Plan,
    *,
    micro_batch_s: float,
    optimizer_s: float | None = None,
    basis: Basis | None = None,
) -> Projection:
    """The run that `plan` is a slice of, with measured seconds per micro batch and per optimizer step.

    factor = measured / modelled compute of the slice's rank; every kernel and launch of the run is scaled by
    it. The optimizer's term is the measured one where it is given. Raises BadInputError as `project`, and for
    a plan that is no slice.
    """
    basis, full = Basis() if basis is None else basis, plan.whole
    if full is None:
        raise BadInputError(f"{plan.asked} at {plan.scale} scale is no slice; name one")
    modelled = modelled_rank(plan.recipe, plan.pipeline_rank, basis=basis)
    projection = project(
        full,
        constants=basis.constants,
        efficiency=basis.efficiency(full.system),
        compute_factor=micro_batch_s / modelled.micro_batch_s,
    )
    return projection if optimizer_s is None else _with_optimizer(projection, optimizer_s)


def slice_estimate(plan: Plan, *, basis: Basis | None = None) -> tuple[float, int]:
    """Seconds and device bytes that the slice `plan` takes: start, weights, and all its steps.

    Raises BadInputError for a system without a GPU.
    """
    recipe = plan.recipe
    rank = modelled_rank(recipe, plan.pipeline_rank, basis=basis)
    memory = rank_memory(recipe, plan.pipeline_rank)
    step_s = recipe.num_micro_batches * rank.micro_batch_s + rank.optimizer_s
    num_steps = recipe.steps.num_warmup + recipe.steps.num_timed
    seconds = START_S + memory.states_bytes / _INIT_BYTES_PER_S + num_steps * step_s
    return seconds, memory.total_bytes + LONE_CONTEXT_BYTES


def _compute_s(work: StepWork, pipeline_rank: int, constants: Constants) -> float:
    """Seconds of one micro batch through all chunks of a rank when nothing is sent."""
    total_s = layer_times(_without_messages(stack(work.layers)), constants).total_s.sum(1)
    return sum(
        number * float(total_s[layer])
        for chunk, counts in zip(work.lowered.chunks, work.chunk_counts, strict=True)
        if chunk.pipeline_rank == pipeline_rank
        for layer, number in counts.items()
    )


def _without_messages(table: LayerTable) -> LayerTable:
    nothing = np.zeros_like(table.nvlink_s)
    return replace(table, nvlink_s=nothing, nic_s=nothing, latency_s=nothing)


def _with_optimizer(projection: Projection, optimizer_s: float) -> Projection:
    others = tuple(term for term in projection.terms if term.name != "optimizer")
    return replace(
        projection,
        terms=(*others, Term(name="optimizer", seconds=optimizer_s, grade=Grade.MEASURED_HERE)),
        step_s=sum(term.seconds for term in others) + optimizer_s,
    )
