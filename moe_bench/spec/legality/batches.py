"""The global batch divides into micro batches per data-parallel rank, in groups that can be interleaved."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, nearest_multiples, rule
from moe_bench.spec.recipe import Recipe

_SCHEDULES = "megatron/core/pipeline_parallel/schedules.py"


@rule("every data-parallel rank runs the same number of micro batches", "megatron/training/arguments.py:694")
def global_batch(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    if not _has_data_ranks(recipe):
        return
    unit = recipe.micro_batch_size * parallel.data
    if recipe.global_batch_size % unit:
        yield (
            "global_batch_size",
            f"micro batch {recipe.micro_batch_size} x DP{parallel.data} = {unit}, "
            f"global batch {recipe.global_batch_size}",
            f"use {nearest_multiples(recipe.global_batch_size, unit)}",
        )


@rule(
    "the interleaved schedule runs groups of at least PP and at most all micro batches, the last included",
    f"{_SCHEDULES}:1141",
    f"{_SCHEDULES}:1153",
)
def interleaved_groups(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    if parallel.virtual_pipeline == 1 or parallel.pipeline == 1 or not _has_data_ranks(recipe):
        return
    unit = recipe.micro_batch_size * parallel.data
    if recipe.global_batch_size % unit:
        return
    group, num = parallel.micro_batch_group_size or parallel.pipeline, recipe.num_micro_batches
    if parallel.pipeline <= group <= num and not 0 < num % group < parallel.pipeline:
        return
    values = f"{num} micro batches in groups of {group}, PP{parallel.pipeline}"
    pipeline_fits = num >= parallel.pipeline and num % parallel.pipeline == 0
    if group < parallel.pipeline or (parallel.micro_batch_group_size and pipeline_fits):
        yield "parallel.micro_batch_group_size", values, f"write {parallel.pipeline}, or 0"
    else:
        yield "global_batch_size", values, f"use {nearest_multiples(recipe.global_batch_size, unit * group)}"


@rule(
    "batched transfers would send twice between one pair of ranks, and give wrong gradients",
    "megatron/training/arguments.py:972",
)
def two_ranks_interleaved(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    if parallel.pipeline == 2 and parallel.virtual_pipeline > 1 and not recipe.overlap.p2p:
        yield (
            "overlap.p2p",
            f"false with PP2 and {parallel.virtual_pipeline} virtual stages",
            "write true",
        )


@rule("only the interleaved schedule overlaps pipeline transfers", "megatron/training/arguments.py:978")
def p2p_overlap(recipe: Recipe) -> Iterator[Found]:
    if recipe.overlap.p2p and recipe.parallel.virtual_pipeline == 1:
        yield "overlap.p2p", "true without virtual stages", "write false"


@rule("a bias_std skews the routing, and belongs to that mode", "moe_bench/spec/recipe.py")
def routing_bias(recipe: Recipe) -> Iterator[Found]:
    routing = recipe.routing
    if (routing.mode == "biased") != (routing.bias_std > 0):
        fix = "write a positive one" if routing.mode == "biased" else "remove it, or set mode biased"
        yield "routing.bias_std", f"{routing.bias_std} with mode {routing.mode}", fix


@rule(
    "a recording counts every expert of a layer, none above the k-th part of the sum: a token takes it once",
    "moe_bench/spec/routing_trace.py",
)
def routing_trace(recipe: Recipe) -> Iterator[Found]:
    routing, moe, key = recipe.routing, recipe.model.moe, "routing.trace"
    if (routing.mode == "recorded") != bool(routing.trace):
        fix = "name a recording" if routing.mode == "recorded" else "remove it, or set mode recorded"
        yield key, f"{len(routing.trace)} layers with mode {routing.mode}", fix
    for index, layer in enumerate(routing.trace if moe is not None else ()):
        if moe is not None and len(layer) != moe.num_experts:
            yield key, f"{len(layer)} experts in layer {index}", f"record {moe.num_experts}"
        elif moe is not None and max(layer) * moe.top_k > sum(layer):
            yield key, f"an expert with {max(layer)} of {sum(layer)} in layer {index}", "record whole tokens"


RULES = (global_batch, interleaved_groups, two_ranks_interleaved, p2p_overlap, routing_bias, routing_trace)


def _has_data_ranks(recipe: Recipe) -> bool:
    return recipe.parallel.num_gpus % recipe.parallel.model_parallel == 0
