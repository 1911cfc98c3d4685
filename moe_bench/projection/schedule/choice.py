"""The pipeline schedule of a recipe: Megatron-Core's, or another that a user asks about."""

from __future__ import annotations

from moe_bench.projection.schedule.shape import ScheduleError, ScheduleKind, ScheduleShape
from moe_bench.spec.recipe import Recipe


def schedule_kind(recipe: Recipe) -> ScheduleKind:
    """The schedule that Megatron-Core runs for `recipe` (pipeline_parallel/schedules.py)."""
    parallel = recipe.parallel
    if parallel.pipeline == 1:
        return ScheduleKind.NO_PIPELINE
    if parallel.virtual_pipeline == 1:
        return ScheduleKind.ONE_F_ONE_B
    if recipe.overlap.expert_parallel:
        return ScheduleKind.INTERLEAVED_EP_OVERLAP
    return ScheduleKind.INTERLEAVED


def overlaps_experts(recipe: Recipe, kind: ScheduleKind) -> bool:
    """Whether dispatch and combine run beside another micro batch."""
    return recipe.overlap.expert_parallel or kind is ScheduleKind.DUAL_PIPE_V


def schedule_shape(recipe: Recipe, kind: ScheduleKind) -> ScheduleShape:
    """`kind` at the sizes of `recipe`. Raises ScheduleError where no such schedule exists."""
    parallel = recipe.parallel
    if parallel.pipeline == 1 and kind is not ScheduleKind.NO_PIPELINE:
        raise ScheduleError(
            f"{kind} with one pipeline rank: nothing is scheduled; parallel.pipeline: 2 or more"
        )
    return ScheduleShape(
        kind=kind,
        num_ranks=parallel.pipeline,
        num_virtual=parallel.virtual_pipeline,
        num_micro_batches=recipe.num_micro_batches,
        group_size=parallel.micro_batch_group_size or parallel.pipeline,
    )
