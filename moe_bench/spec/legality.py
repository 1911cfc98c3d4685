"""Rules that make a recipe impossible: the values, the reason, and the nearest legal change."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moe_bench.spec.pipeline import LayoutError, pipeline_chunks
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Problem:
    """A rule that a recipe breaks, at the key where the user would change it."""

    path: tuple[str | int, ...]
    problem: str
    fix: str


def legality_problems(recipe: Recipe) -> tuple[Problem, ...]:
    """Every rule that `recipe` breaks; empty for a legal recipe."""
    return tuple(problem for rule in _RULES for problem in rule(recipe))


def _dense_grid(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    if parallel.num_gpus % parallel.model_parallel:
        yield Problem(
            ("parallel", "num_gpus"),
            f"TP{parallel.tensor} x PP{parallel.pipeline} x CP{parallel.context} = {parallel.model_parallel} "
            f"does not divide num_gpus = {parallel.num_gpus}",
            f"use a multiple of {parallel.model_parallel} GPUs",
        )


def _expert_grid(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    wanted = parallel.expert * parallel.expert_tensor * parallel.pipeline
    if parallel.num_gpus % wanted:
        yield Problem(
            ("parallel", "expert"),
            f"ETP{parallel.expert_tensor} x EP{parallel.expert} x PP{parallel.pipeline} = {wanted} GPUs, "
            f"num_gpus = {parallel.num_gpus}",
            f"use a multiple of {wanted} GPUs or a smaller expert size",
        )


def _experts(recipe: Recipe) -> Iterator[Problem]:
    moe, expert = recipe.model.moe, recipe.parallel.expert
    if moe is None:
        if expert > 1:
            yield Problem(("parallel", "expert"), f"EP{expert} on a model without experts", "write 1")
        return
    if moe.num_experts % expert:
        yield Problem(
            ("parallel", "expert"),
            f"EP{expert} does not divide {moe.num_experts} experts",
            f"use {_nearest_divisor(moe.num_experts, expert)}",
        )
    if moe.top_k > moe.num_experts:
        yield Problem(
            ("model", "moe", "top_k"), f"top_k {moe.top_k} of {moe.num_experts} experts", "lower it"
        )
    router = moe.router
    if router.num_groups and (moe.num_experts % router.num_groups or not router.groups_per_token):
        yield Problem(
            ("model", "moe", "router", "num_groups"),
            f"{router.num_groups} groups over {moe.num_experts} experts, {router.groups_per_token} per token",
            "use a divisor of the experts and state groups_per_token",
        )
    if router.score_function == "sigmoid" and not router.renormalise and moe.top_k > 1:
        yield Problem(
            ("model", "moe", "router", "renormalise"),
            "Megatron-Core always renormalises sigmoid scores (moe_utils.topk_routing_with_score_function)",
            "write true",
        )


def _heads(recipe: Recipe) -> Iterator[Problem]:
    tensor, attention = recipe.parallel.tensor, recipe.model.attention
    if attention.num_heads % tensor:
        yield Problem(
            ("parallel", "tensor"),
            f"TP{tensor} does not divide {attention.num_heads} heads",
            f"use {_nearest_divisor(attention.num_heads, tensor)}",
        )
    if (
        attention.kind == "gqa"
        and attention.num_query_groups % tensor
        and tensor % attention.num_query_groups
    ):
        yield Problem(
            ("parallel", "tensor"),
            f"TP{tensor} and {attention.num_query_groups} query groups do not divide one another",
            f"use {_nearest_divisor(attention.num_query_groups, tensor)}",
        )


def _layers(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    key = "layout" if parallel.layout is not None else "pipeline"
    try:
        chunks = pipeline_chunks(
            parallel, num_layers=recipe.model.num_layers, num_mtp_layers=recipe.num_mtp_layers
        )
    except LayoutError as error:
        problem, _, fix = str(error).rpartition("; ")
        yield Problem(("parallel", key), problem or str(error), fix)
        return
    first_rank = [chunk for chunk in chunks if chunk.pipeline_rank == 0]
    if parallel.pipeline > 1 and any(chunk.num_mtp_layers for chunk in first_rank):
        yield Problem(
            ("parallel", key),
            "an MTP layer on the first pipeline rank (Megatron-Core's layout forbids it; where it does not, "
            "the schedule hangs)",
            "move the letter m to another rank",
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield Problem(
            ("parallel", "virtual_pipeline"), "virtual stages need a pipeline", "write 1, or raise pipeline"
        )
    if recipe.num_mtp_layers > recipe.model.num_mtp_layers:
        yield Problem(
            ("num_mtp_layers",),
            f"{recipe.num_mtp_layers} MTP layers, the model has {recipe.model.num_mtp_layers}",
            "write at most that",
        )


def _batches(recipe: Recipe) -> Iterator[Problem]:
    parallel = recipe.parallel
    if parallel.num_gpus % parallel.model_parallel:
        return
    unit = recipe.micro_batch_size * parallel.data
    if recipe.global_batch_size % unit:
        below = max(unit, recipe.global_batch_size // unit * unit)
        yield Problem(
            ("global_batch_size",),
            f"micro batch {recipe.micro_batch_size} x DP{parallel.data} = {unit} does not divide "
            f"{recipe.global_batch_size}",
            f"use {below} or {below + unit}",
        )
        return
    group = parallel.micro_batch_group_size or parallel.pipeline
    if (
        parallel.virtual_pipeline > 1
        and recipe.num_micro_batches % group
        and not parallel.micro_batch_group_size
    ):
        yield Problem(
            ("global_batch_size",),
            f"{recipe.num_micro_batches} micro batches in groups of {group} (interleaved schedule)",
            f"use a multiple of {unit * group}",
        )


def _sequence(recipe: Recipe) -> Iterator[Problem]:
    parallel, seq_len = recipe.parallel, recipe.seq_len
    unit = parallel.tensor * (2 * parallel.context if parallel.context > 1 else 1)
    if seq_len % unit:
        yield Problem(
            ("seq_len",),
            f"{seq_len} tokens over TP{parallel.tensor} and CP{parallel.context}",
            f"use a multiple of {unit}",
        )
    if parallel.tensor > 1 and parallel.expert > 1 and not parallel.sequence_parallel:
        yield Problem(
            ("parallel", "sequence_parallel"),
            "expert parallelism with tensor parallelism needs sequence parallelism "
            "(Megatron-Core's validate_args)",
            "write true",
        )
    if parallel.sequence_parallel and parallel.tensor == 1:
        yield Problem(
            ("parallel", "sequence_parallel"), "there is no tensor parallelism to go with it", "write false"
        )


def _precision(recipe: Recipe) -> Iterator[Problem]:
    gpu = recipe.system.gpu
    if recipe.precision in ("mxfp8", "nvfp4") and gpu is not None and gpu.architecture != "blackwell":
        yield Problem(
            ("precision",), f"{recipe.precision} needs Blackwell, {recipe.system.key} is {gpu.architecture}",
            "use fp8_blockwise, fp8_tensorwise or bf16",
        )  # fmt: skip
    if recipe.precision in ("fp32", "bf16") and recipe.low_precision is not None:
        yield Problem(
            ("low_precision",), f"options of FP8 with precision {recipe.precision}", "remove the block"
        )


def _features(recipe: Recipe) -> Iterator[Problem]:
    parallel, overlap, recompute = recipe.parallel, recipe.overlap, recipe.recompute
    if overlap.p2p and parallel.virtual_pipeline == 1:
        yield Problem(
            ("overlap", "p2p"), "only the interleaved schedule overlaps pipeline transfers", "write false"
        )
    if parallel.pipeline == 2 and parallel.virtual_pipeline > 1 and not overlap.p2p:
        yield Problem(
            ("overlap", "p2p"),
            "PP2 with virtual stages and batched transfers sends twice between one pair "
            "(megatron/training/arguments.py refuses it)",
            "write true",
        )
    if overlap.delayed_wgrad and not overlap.expert_parallel:
        yield Problem(
            ("overlap", "delayed_wgrad"), "fills the gaps of overlap.expert_parallel", "switch that on too"
        )
    if recompute.granularity == "selective" and not recompute.modules:
        yield Problem(("recompute", "modules"), "selective recompute of nothing", "name modules, or none")
    if recompute.granularity == "full" and not recompute.num_layers:
        yield Problem(("recompute", "num_layers"), "full recompute of 0 layers", "state at least 1")
    if recompute.granularity != "selective" and recompute.modules:
        yield Problem(("recompute", "modules"), f"not read with {recompute.granularity}", "remove them")
    if (recipe.routing.mode == "biased") != (recipe.routing.bias_std > 0):
        yield Problem(("routing", "bias_std"), "belongs to mode biased", "set both or neither")


_RULES: tuple[Callable[[Recipe], Iterator[Problem]], ...] = (
    _dense_grid, _expert_grid, _experts, _heads, _layers, _batches, _sequence, _precision, _features,
)  # fmt: skip


def _nearest_divisor(number: int, wanted: int) -> int:
    """The largest divisor of `number` that is at most `wanted`."""
    return max(divisor for divisor in range(1, min(number, wanted) + 1) if number % divisor == 0)
