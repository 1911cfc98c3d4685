"""What one rank that ran alone says of its job: compute per micro batch, the bound it sets, its memory."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from moe_bench.analysis.flops import step_flops
from moe_bench.analysis.memory import rank_memory
from moe_bench.analysis.rank_flops import rank_flops
from moe_bench.analysis.stats import steady_state
from moe_bench.results.metrics import COUNTING, rank_step_flops
from moe_bench.results.record import Record
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceMetrics:
    """Compute of one rank: no communication, no pipeline bubble, nobody to wait for."""

    num_micro_batches: int
    """That the rank ran in a step."""
    micro_batch_s: float
    """One micro batch forward and backward through all chunks of the rank, less the copies that stood in for
    what others send."""
    optimizer_s: float
    """What a step adds to its schedule: zeroed gradients, their norm, the optimizer."""
    stand_in_s: float
    """Per step, those copies."""
    flops_per_s: float
    """Model FLOPs of the rank's micro batch over `micro_batch_s`, counted as `metrics.COUNTING` says."""
    hardware_flops_per_s: float
    """The same of all that its kernels multiply: recomputation, and attention's scores again backward."""
    peak_memory_bytes: int
    closed_form_peak_bytes: int
    """Of the same rank by `analysis.memory`."""


def slice_metrics(record: Record) -> SliceMetrics | None:
    """Reduce the record of a slice; None for other runs, and for one without samples of the schedule.

    c = (median schedule - copies) / m over the steady steps, m micro batches; the optimizer's time is the
    median of what steps take beyond their schedules.
    """
    alone, plan = record.samples.alone, record.plan
    if alone is None or not plan.is_slice:
        return None
    recipe, number = plan.recipe, plan.recipe.num_micro_batches
    times_s = record.slowest_step_times_s()
    first = steady_state(times_s).first_step
    schedules_s = alone.schedule_times_s[first:]
    rests_s = [step_s - own_s for step_s, own_s in zip(times_s[first:], schedules_s, strict=True)]
    compute_s = statistics.median(schedules_s) - alone.stand_in_s
    return SliceMetrics(
        num_micro_batches=number,
        micro_batch_s=compute_s / number,
        optimizer_s=statistics.median(rests_s),
        stand_in_s=alone.stand_in_s,
        flops_per_s=rank_step_flops(record) / compute_s,
        hardware_flops_per_s=_hardware_flops(recipe, plan.pipeline_rank) / compute_s,
        peak_memory_bytes=record.samples.peak_memory_bytes[0],
        closed_form_peak_bytes=rank_memory(recipe, plan.pipeline_rank).total_bytes,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Bound:
    """The most that a run can reach whose ranks all compute as long as the one that was measured."""

    step_s: float
    """M c + optimizer, M micro batches of a step."""
    tokens_per_s_per_gpu: float
    flops_per_s_per_gpu: float
    """Model FLOPs of the whole step over all GPUs and `step_s`, counted as `metrics.COUNTING` says."""


def bound_of(metrics: SliceMetrics, whole: Recipe) -> Bound:
    """The bound that a slice sets on the run that it is a part of."""
    step_s = whole.num_micro_batches * metrics.micro_batch_s + metrics.optimizer_s
    gpu_s = step_s * whole.parallel.num_gpus
    return Bound(
        step_s=step_s,
        tokens_per_s_per_gpu=whole.tokens_per_step / gpu_s,
        flops_per_s_per_gpu=step_flops(whole, counting=COUNTING) / gpu_s,
    )


def _hardware_flops(recipe: Recipe, pipeline_rank: int) -> int:
    return sum(line.total_flops for line in rank_flops(recipe, pipeline_rank))
