"""The recipes that a search writes: named after their layouts, with the command that found them on top."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.projection.search.layout import Layout
from moe_bench.spec.pipeline import expand_layout
from moe_bench.spec.recipe import Recipe


def named(recipe: Recipe, layout: Layout) -> Recipe:
    """`recipe` with a variant that says batch and layout: no two files of a search are called alike."""
    return recipe.model_copy(update={"variant": "_".join(("search", *_parts(recipe, layout)))})


def comment(command: str, notes: tuple[str, ...]) -> str:
    """What stands on top of the file."""
    return f"Found by `{command}`: {'; '.join(notes)}. Projected, not measured."


def _parts(recipe: Recipe, layout: Layout) -> Iterator[str]:
    parallel = recipe.parallel
    yield f"s{recipe.seq_len}"
    yield f"gbs{recipe.global_batch_size}"
    yield f"mbs{recipe.micro_batch_size}"
    for name, size in (
        ("tp", parallel.tensor),
        ("etp", parallel.expert_tensor),
        ("cp", parallel.context),
        ("ep", parallel.expert),
        ("pp", parallel.pipeline),
        ("vpp", parallel.virtual_pipeline),
    ):
        if size > 1:
            yield f"{name}{size}"
    if parallel.context > 1 and parallel.context_comm != "p2p":
        yield parallel.context_comm
    yield from _sharding_parts(layout)
    if parallel.layout is not None:
        stages = expand_layout(parallel.layout)
        yield f"{stages[0].count('t')}to{stages[-1].count('t')}"
    if recipe.model.moe is not None:
        yield layout.dispatcher
    if layout.overlaps_experts:
        yield "overlap"
    recompute = layout.recompute
    if recompute.granularity != "none":
        yield "_".join(("recompute", *(recompute.modules or (recompute.granularity,))))


def _sharding_parts(layout: Layout) -> Iterator[str]:
    """Nothing for one distributed optimizer."""
    sharding = layout.sharding
    if sharding.is_fsdp:
        yield "fsdp" if sharding.divides_weights else f"fsdp_{sharding.fsdp_strategy}"
    elif sharding.data_sharding == "none":
        yield "unsharded"
    if sharding.num_instances > 1:
        yield f"inst{sharding.num_instances}"
