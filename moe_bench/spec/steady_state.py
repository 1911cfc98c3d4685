"""How many micro batches show what every further one of a step does."""

from __future__ import annotations

from moe_bench.spec.recipe import Recipe


def num_micro_batches_to_run(recipe: Recipe) -> int:
    """The fewest micro batches that bring every rank to its steady state, at most those of the recipe.

    One after the other (no pipeline): 2, so that one follows another; 3 where the forward pass of one runs
    beside the backward pass of another. 1F1B: PP, as many as are ever in flight, at least 2. Interleaved:
    three groups of PP (or of `micro_batch_group_size`), as the first fills the pipeline, the second is in
    flight with it and the third is the first to alternate. Megatron-FSDP: 3, as the first finds weights that
    were gathered before the step and the last may reduce what the others have added up.
    """
    parallel = recipe.parallel
    if parallel.virtual_pipeline > 1:
        wanted = 3 * max(parallel.pipeline, parallel.micro_batch_group_size)
    elif recipe.overlap.expert_parallel or parallel.data_sharding == "megatron_fsdp":
        wanted = max(parallel.pipeline, 3)
    else:
        wanted = max(parallel.pipeline, 2)
    return min(wanted, recipe.num_micro_batches)
