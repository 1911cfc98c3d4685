"""Memory under a pipeline schedule that Megatron-Core does not have: its order of work, its placement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from moe_bench.analysis.chunk_memory import ChunkMemory, ModelMemory
from moe_bench.analysis.live_tensors import Instant
from moe_bench.analysis.memory import MemoryFit, RankMemory, memory_fit, pipeline_memory, usable_bytes
from moe_bench.analysis.overlap_memory import overlapped_instant
from moe_bench.analysis.schedule_memory import Phase, StepPeak, step_peak
from moe_bench.projection.schedule.choice import schedule_shape
from moe_bench.projection.schedule.placement import placed
from moe_bench.projection.schedule.program import Work
from moe_bench.projection.schedule.shape import PassKind, ScheduleKind, ScheduleShape
from moe_bench.projection.schedule.whatif import what_if_order
from moe_bench.spec.recipe import Recipe

_STEADY_ROUNDS = 4
"""Micro batches per rank after which no published order holds more than before."""


def schedule_memory(recipe: Recipe, kind: ScheduleKind, *, load: float) -> MemoryFit:
    """Memory of every pipeline rank with `kind` in the place of Megatron-Core's schedule.

    Weights, gradients and optimizer are those of the chunks that the schedule places on a rank. A chunk's
    activations stay from its forward pass to its weight gradient: what the input's gradient sets free earlier
    is about what the weights' gradient needs of other gradients. What lingers in Megatron-Core's variables is
    left out. Raises ScheduleError where no such schedule exists, BadInputError for a system without GPU.
    """
    overlaps = kind is ScheduleKind.INTERLEAVED_EP_OVERLAP
    if kind is ScheduleKind.INTERLEAVED or overlaps:
        overlap = recipe.overlap.model_copy(update={"expert_parallel": overlaps})
        return memory_fit(recipe.model_copy(update={"overlap": overlap}), load=load)
    shape = schedule_shape(recipe, kind)
    if kind in (ScheduleKind.NO_PIPELINE, ScheduleKind.ONE_F_ONE_B):
        return memory_fit(recipe, load=load)
    own = placed(recipe, kind)
    model = ModelMemory(own, load=load)
    ranks = [_rank(own, shape, memory, model) for memory in pipeline_memory(own, load=load)]
    return MemoryFit(ranks=tuple(ranks), usable_bytes=usable_bytes(recipe))


def _rank(recipe: Recipe, shape: ScheduleShape, memory: RankMemory, model: ModelMemory) -> RankMemory:
    """`memory`, which Megatron-Core's order has made, with the fullest moment of the other order."""
    rank, vector_bytes = memory.pipeline_rank, model.sizes.vector_bytes
    chunks = recipe.chunks()
    held = {index: model.chunk(chunks[index]) for index in shape.chunks_of(rank)}
    before = step_peak(recipe, list(held.values()), vector_bytes=vector_bytes)
    short = replace(
        shape, num_micro_batches=min(shape.num_micro_batches, _STEADY_ROUNDS * 2 * shape.num_ranks)
    )
    after = order_peak(what_if_order(short, rank), held, vector_bytes=vector_bytes)
    return replace(
        memory,
        activations_bytes=memory.activations_bytes
        - before.held.activations_bytes
        + after.held.activations_bytes,
        recomputed_bytes=memory.recomputed_bytes - before.held.recomputed_bytes + after.held.recomputed_bytes,
        backward_bytes=memory.backward_bytes - before.held.backward_bytes + after.held.backward_bytes,
        pipeline_bytes=after.pipeline_bytes,
        peak_at=f"{after.phase} of {after.place}",
    )


def order_peak(order: Sequence[Work], chunks: Mapping[int, ChunkMemory], *, vector_bytes: int) -> StepPeak:
    """The fullest moment of one rank that computes `order` with its `chunks`, by index."""
    live_bytes, best = 0, None
    for work in order:
        first = work[0]
        behind = work[-1] if len(work) > 1 else first
        if behind.kind in (PassKind.BACKWARD, PassKind.DGRAD):
            live_bytes -= chunks[behind.chunk].kept_bytes
        instant, phase = _fullest(work, chunks, vector_bytes)
        held = instant.held.plus(live_bytes)
        if best is None or held.total_bytes > best.total_bytes:
            best = StepPeak(held=held, pipeline_bytes=0, phase=phase, place=instant.place)
        if first.kind is PassKind.FORWARD:
            live_bytes += chunks[first.chunk].kept_bytes
        if behind.kind is PassKind.DGRAD:
            live_bytes += chunks[behind.chunk].kept_bytes
        elif behind.kind is PassKind.WGRAD:
            live_bytes -= chunks[behind.chunk].kept_bytes
    if best is None:
        raise ValueError("no pass has run")
    return best


def _fullest(work: Work, chunks: Mapping[int, ChunkMemory], vector_bytes: int) -> tuple[Instant, Phase]:
    """The fullest moment of one slot beside what other micro batches keep."""
    memory = chunks[work[0].chunk]
    if len(work) > 1:
        both = overlapped_instant(memory, chunks[work[1].chunk], vector_bytes=vector_bytes)
        return both, "backward"
    if work[0].kind is PassKind.FORWARD:
        return memory.forward, "forward"
    if work[0].kind is PassKind.WGRAD:
        return Instant(memory.backward.held.times(0), memory.backward.place), "backward"
    return memory.backward, "backward"
