"""How many micro batches show what a step does, and how their totals become those of the whole step."""

from __future__ import annotations

from moe_bench.harness.dryrun.places import Phase
from moe_bench.spec.recipe import Recipe

PER_MICRO_BATCH = frozenset({Phase.FORWARD, Phase.RECOMPUTE, Phase.BACKWARD, Phase.PIPELINE})
"""Phases that every micro batch goes through alike; the others come once per step."""


def num_micro_batches_to_run(recipe: Recipe) -> int:
    """The fewest micro batches that bring every rank to its steady state, at most those of the recipe.

    One after the other (no pipeline): 2, so that one follows another; 3 where the forward pass of one runs
    beside the backward pass of another. 1F1B: PP, as many as are ever in flight, at least 2. Interleaved:
    three groups of PP (or of `micro_batch_group_size`), as the first fills the pipeline, the second is in
    flight with it and the third is the first to alternate. Megatron-FSDP: all, as it gathers weights for
    some micro batches and finds them still gathered for others.
    """
    parallel = recipe.parallel
    if parallel.data_sharding == "megatron_fsdp":
        return recipe.num_micro_batches
    if parallel.virtual_pipeline > 1:
        wanted = 3 * max(parallel.pipeline, parallel.micro_batch_group_size)
    else:
        wanted = max(parallel.pipeline, 3 if recipe.overlap.expert_parallel else 2)
    return min(wanted, recipe.num_micro_batches)


def over_the_step(count: int, phase: Phase, *, num_run: int, num_micro_batches: int) -> int:
    """A total of `num_run` micro batches as that of the whole step: in proportion, or once per step."""
    if phase not in PER_MICRO_BATCH:
        return count
    total, remainder = divmod(count * num_micro_batches, num_run)
    if remainder:
        raise ValueError(f"{phase}: {count} does not divide over the {num_run} micro batches that were run")
    return total
