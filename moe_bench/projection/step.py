"""One recipe's step before it is run: a waterfall of terms that sum to it, its schedule, its throughput."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moe_bench.analysis.flops import step_flops
from moe_bench.projection.constants import Constants
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.layer_time import LayerTimes
from moe_bench.projection.pricing import PARTS, PASSES
from moe_bench.projection.schedule.choice import schedule_shape
from moe_bench.projection.schedule.megatron import TransferRule
from moe_bench.projection.schedule.shape import ScheduleKind
from moe_bench.projection.schedule.simulation import ChunkTime, Timeline, simulate_shape
from moe_bench.projection.step_time import StepTable, StepTimes, link_seconds, step_table, step_times
from moe_bench.projection.step_work import StepWork, step_work
from moe_bench.projection.sync_windows import exposed_s, gathering_windows_s, reduction_windows_s
from moe_bench.projection.work.operations import Pass
from moe_bench.projection.work.traits import MEGATRON, Traits
from moe_bench.results.flops_convention import OUR_COUNTING
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One bar of the waterfall."""

    name: str
    seconds: float
    grade: Grade


@dataclass(frozen=True, slots=True, kw_only=True)
class Projection:
    """The step of one recipe on its busiest pipeline rank."""

    recipe: Recipe
    step_s: float
    terms: tuple[Term, ...]
    """In order; their sum is `step_s`."""
    passes_s: Mapping[Pass, float]
    """The kernels of the layers by pass; their sum is that of the terms which name a part."""
    timeline: Timeline | None
    """The pipeline, simulated; None without a pipeline."""
    critical_rank: int
    """The pipeline rank that the waterfall shows."""
    flops: int
    """Of the whole step, counted as OUR_COUNTING says."""

    @property
    def tokens_per_s_per_gpu(self) -> float:
        """Tokens of a step / (step time x GPUs)."""
        return self.recipe.tokens_per_step / (self.step_s * self.recipe.parallel.num_gpus)

    @property
    def flops_per_s_per_gpu(self) -> float:
        """Model FLOPs of a step / (step time x GPUs)."""
        return self.flops / (self.step_s * self.recipe.parallel.num_gpus)

    @property
    def mfu_fraction(self) -> float:
        """Model FLOPs per second over the GPU's dense BF16 peak, whatever the precision."""
        gpu = self.recipe.system.gpu
        return self.flops_per_s_per_gpu / gpu.bf16_flops_per_s if gpu is not None else float("nan")


def project(
    recipe: Recipe,
    *,
    constants: Constants | None = None,
    efficiency: Efficiency | None = None,
    load: float | None = None,
    traits: Traits = MEGATRON,
    schedule: ScheduleKind | None = None,
    compute_factor: float = 1.0,
) -> Projection:
    """`recipe` projected: priced, its pipeline simulated, its terms added up; `load`, `traits` and `schedule`
    as in `step_work`, which raises. Every kernel and launch takes `compute_factor` times what the laws say.
    """
    constants = constants or Constants()
    work = step_work(recipe, efficiency, load=load, traits=traits, schedule=schedule)
    table, (timeline,) = _simulated_all([work], constants, compute_factor=compute_factor)
    return _projection(work, step_times(table, constants), timeline)


def with_schedules(works: Sequence[StepWork], constants: Constants) -> StepTable:
    """`works` as columns, each with what its simulated pipeline takes and hides over the closed form."""
    table, _ = _simulated_all(works, constants)
    return table


def _simulated_all(
    works: Sequence[StepWork], constants: Constants, *, compute_factor: float = 1.0
) -> tuple[StepTable, list[Timeline | None]]:
    table = step_table(works)
    if compute_factor != 1:
        table = replace(table, layers=table.layers.slowed(compute_factor))
    times = step_times(table, constants)
    gradients_s = link_seconds(table.gradients_s, constants)
    parameters_s = link_seconds(table.parameters_s, constants)
    timelines = []
    first_layer = 0
    for row, work in enumerate(works):
        transfer_s = _transfer_s(table, row, constants)
        timeline = simulated(work, times.layers, first_layer=first_layer, transfer_s=transfer_s)
        timelines.append(timeline)
        first_layer += len(work.layers)
        if timeline is None:
            continue
        table.schedule_factor[row] = work.num_flushes * _schedule_factor(times, row, timeline)
        rank = int(times.critical_rank[row] - table.first_rank[row])
        reduced = reduction_windows_s(timeline, rank, num_buckets=work.gradients.num_buckets)
        gathered = gathering_windows_s(timeline, rank, num_buckets=work.parameters.num_buckets)
        traffic_s = float(gradients_s[row])
        table.gradient_window_s[row] = traffic_s - exposed_s(reduced, traffic_s)
        traffic_s = float(parameters_s[row])
        table.parameter_window_s[row] = traffic_s - exposed_s(gathered, traffic_s)
    return table, timelines


def simulated(work: StepWork, layers: LayerTimes, *, first_layer: int, transfer_s: float) -> Timeline | None:
    """The pipeline of `work` until it is empty, its layers in `layers` from `first_layer`; else None."""
    recipe = work.recipe
    parallel = recipe.parallel
    if parallel.pipeline == 1:
        return None
    overlaps = recipe.overlap.p2p and parallel.virtual_pipeline > 1
    choices = work.schedule.overlap_choices
    shape = schedule_shape(recipe, work.schedule)
    return simulate_shape(
        replace(shape, num_micro_batches=shape.num_micro_batches // work.num_flushes),
        TransferRule(overlaps=overlaps if overlaps in choices else choices[0], waits_for_sends=False),
        chunks=[_chunk_time(work, layers, first_layer, counts) for counts in work.chunk_counts],
        transfer_s=transfer_s,
    )


def _chunk_time(work: StepWork, layers: LayerTimes, first_layer: int, counts: Mapping[int, int]) -> ChunkTime:
    """Seconds of one chunk: alone, with dispatch in the open; merged with another micro batch, hidden."""
    wgrad = PASSES.index(Pass.WGRAD)
    merged = np.zeros(2)
    alone = np.zeros(2)
    wgrad_s = 0.0
    for layer, number in counts.items():
        row = first_layer + layer
        merged += number * layers.total_s[row]
        alone += number * (layers.total_s[row] - layers.expert_s[row] + layers.expert_traffic_s[row])
        wgrad_s += number * float(layers.parts_s[row, wgrad].sum())
    own = alone if work.overlaps_experts else merged
    return ChunkTime(
        forward_s=float(own[0]),
        dgrad_s=float(own[1]) - wgrad_s,
        wgrad_s=wgrad_s,
        joint_s=float(merged.sum()) if work.overlaps_experts else None,
    )


def _transfer_s(table: StepTable, row: int, constants: Constants) -> float:
    nvlink, nic, latency = table.transfer_s[row]
    return float(max(nvlink / constants.nvlink_fraction, nic / constants.dp_nic_fraction) + latency)


def _schedule_factor(times: StepTimes, row: int, timeline: Timeline) -> float:
    """Simulated time over the closed form's."""
    closed_form_s = float(times.busy_s[row] + times.transfer_s[row] + times.bubble_s[row])
    return timeline.total_s / closed_form_s


def _projection(work: StepWork, times: StepTimes, timeline: Timeline | None) -> Projection:
    recipe, layers = work.recipe, times.layers
    critical = int(times.critical_rank[0])
    counts = np.zeros(len(work.layers))
    for chunk, held in zip(work.lowered.chunks, work.chunk_counts, strict=True):
        for layer, number in held.items():
            counts[layer] += number * (chunk.pipeline_rank == critical)
    counts *= recipe.num_micro_batches
    grades: dict[str, Grade] = {}
    for priced, _ in work.layers:
        for part, grade in priced.grades.items():
            grades[part] = max(grade, grades.get(part, grade))
    worst = max(grades.values())
    # the simulation knows which transfers are hidden, the closed form a share; together they are the waiting
    waiting_s = float(times.bubble_s[0] + times.transfer_s[0])
    transfer_s = min(float(times.transfer_s[0]), waiting_s)
    by_part = np.einsum("l,lqp->qp", counts, layers.parts_s)
    terms = [
        Term(name=part.value, seconds=float(seconds), grade=grades[part])
        for part, seconds in zip(PARTS, by_part.sum(0), strict=True)
        if seconds
    ]
    for name, seconds, term_grade in (
        ("exposed dispatch and combine", float(counts @ layers.expert_s.sum(1)), Grade.FITTED),
        ("tensor parallel", float(counts @ layers.tensor_s.sum(1)), Grade.PRIOR),
        ("context parallel", float(counts @ layers.context_s.sum(1)), Grade.PRIOR),
        ("host", float(counts @ layers.host_s.sum(1)), Grade.FITTED),
        ("pipeline bubble", waiting_s - transfer_s, worst),
        ("pipeline transfers", transfer_s, Grade.PRIOR),
        ("weight gathers", float(times.gathers_s[0]), Grade.PRIOR),
        ("offloaded activations", float(times.offload_s[0]), Grade.PUBLISHED),
        ("scaling factors", float(times.scaling_s[0]), Grade.PRIOR),
        ("gradient reduction", float(times.gradients_s[0]), Grade.PRIOR),
        ("parameter gathering", float(times.parameters_s[0]), Grade.PRIOR),
        ("optimizer", float(times.optimizer_s[0]), Grade.PRIOR),
        ("stragglers", float(times.straggler_s[0]), Grade.FITTED),
    ):
        if seconds > 0:  # what the host adds is a difference of powers, and may be a rounding error below 0
            terms.append(Term(name=name, seconds=seconds, grade=term_grade))
    return Projection(
        recipe=recipe,
        step_s=float(times.step_s[0]),
        terms=tuple(terms),
        passes_s={one: float(by_part[index].sum()) for index, one in enumerate(PASSES)},
        timeline=timeline,
        critical_rank=critical,
        flops=step_flops(recipe, counting=OUR_COUNTING),
    )
