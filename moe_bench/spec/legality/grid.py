"""The GPUs of a job divide into a dense and an expert grid, and these into copies of the optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterator

from moe_bench.spec.legality.rule import Found, nearest_divisor, rule
from moe_bench.spec.recipe import Recipe


@rule(
    "tensor, pipeline and context ranks must tile the job",
    "megatron/core/parallel_state.py:823",
    "megatron/training/arguments.py:430",
)
def dense_grid(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    if parallel.num_gpus % parallel.model_parallel:
        yield (
            "parallel.num_gpus",
            f"TP{parallel.tensor} x PP{parallel.pipeline} x CP{parallel.context} = {parallel.model_parallel} "
            f"GPUs, num_gpus = {parallel.num_gpus}",
            f"use {_nearest_jobs(recipe)} GPUs",
        )


@rule("expert tensor, expert and pipeline ranks must tile the job", "megatron/core/parallel_state.py:882")
def expert_grid(recipe: Recipe) -> Iterator[Found]:
    parallel = recipe.parallel
    wanted = _expert_group(recipe)
    if parallel.num_gpus % wanted == 0:
        return
    fix = f"use {_nearest_jobs(recipe)} GPUs"
    rest = parallel.num_gpus // (parallel.expert_tensor * parallel.pipeline)
    if rest * parallel.expert_tensor * parallel.pipeline == parallel.num_gpus:
        num_experts = recipe.model.moe.common_num_experts if recipe.model.moe is not None else 1
        fix += f", or EP{nearest_divisor(math.gcd(rest, num_experts), parallel.expert)}"
    yield (
        "parallel.expert",
        f"ETP{parallel.expert_tensor} x EP{parallel.expert} x PP{parallel.pipeline} = {wanted} GPUs, "
        f"num_gpus = {parallel.num_gpus}",
        fix,
    )


@rule(
    "every copy of the sharded optimizer needs as many ranks, dense and expert",
    "megatron/core/parallel_state.py:922",
    "megatron/core/parallel_state.py:1447",
    "megatron/core/distributed/distributed_data_parallel.py:293",
)
def optimizer_instances(recipe: Recipe) -> Iterator[Found]:
    parallel, key = recipe.parallel, "parallel.num_optimizer_instances"
    instances = parallel.num_optimizer_instances
    if instances == 1 or not _has_grids(recipe):
        return
    if parallel.data_sharding == "none":
        yield key, f"{instances} instances, data_sharding none", "write 1, or distributed_optimizer"
    for shards, what in ((parallel.dense_shards, "DP x CP"), (parallel.expert_data, "expert DP")):
        if shards % instances:
            yield (
                key,
                f"{instances} instances, {what} = {shards}",
                f"use {nearest_divisor(math.gcd(parallel.dense_shards, parallel.expert_data), instances)}",
            )


RULES = (dense_grid, expert_grid, optimizer_instances)


def _expert_group(recipe: Recipe) -> int:
    parallel = recipe.parallel
    return parallel.expert_tensor * parallel.expert * parallel.pipeline


def _has_grids(recipe: Recipe) -> bool:
    """Whether both grids tile the job, so that data-parallel sizes mean something."""
    num_gpus = recipe.parallel.num_gpus
    return num_gpus % recipe.parallel.model_parallel == 0 and num_gpus % _expert_group(recipe) == 0


def _nearest_jobs(recipe: Recipe) -> str:
    """The numbers of GPUs around the recipe's that both grids tile."""
    unit = math.lcm(recipe.parallel.model_parallel, _expert_group(recipe))
    below = recipe.parallel.num_gpus // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
