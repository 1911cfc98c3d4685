"""What gradients and parameters carry once per optimizer step: their buffers over the data-parallel ranks.

Megatron-Core 0.19.2: distributed/param_and_grad_buffer.py, distributed/finalize_model_grads.py,
optimizer/distrib_optimizer.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_bench.analysis.activations import activation_element_bytes
from moe_bench.analysis.collectives import Call, Collective, Group, Phase
from moe_bench.analysis.fsdp import sharded_buffers
from moe_bench.analysis.tensors import Tensor, bucket_elements, bucket_limit, chunk_tensors
from moe_bench.spec.pipeline import Chunk, embedding_pipeline_ranks
from moe_bench.spec.recipe import Precision, Recipe

GATHER, SCATTER, REDUCE = Collective.ALL_GATHER, Collective.REDUCE_SCATTER, Collective.ALL_REDUCE
FP32_BYTES = 4
FP8_BYTES = 1

_STORED_BYTES: dict[Precision, float] = {
    "fp8_delayed": 1,
    "fp8_tensorwise": 1,
    "fp8_blockwise": 1,
    "mxfp8": 2,
    "nvfp4": 1 / 2,
}
"""Bytes of a gathered element where primary weights are quantized; MXFP8 gathers BF16 and quantizes after
(param_and_grad_buffer.py, shared_buffer)."""


def state_calls(recipe: Recipe, chunks: Sequence[Chunk]) -> Iterator[tuple[Phase, int, Call]]:
    """All of it for the chunks of one rank, with how often each call is made in a step."""
    if recipe.parallel.data_sharding == "megatron_fsdp":
        yield from _fsdp_calls(recipe, chunks)
    else:
        for phase, call in gradient_and_parameter_calls(recipe, chunks):
            yield phase, 1, call
    for phase, call in _finalize_calls(recipe, chunks):
        yield phase, 1, call


def gradient_bytes(recipe: Recipe) -> int:
    """Bytes of a gradient as it is reduced: 4, or the activation's where `gradient_dtype` is BF16."""
    return FP32_BYTES if recipe.optimizer.gradient_dtype == "fp32" else activation_element_bytes(recipe)


def gradient_and_parameter_calls(recipe: Recipe, chunks: Sequence[Chunk]) -> Iterator[tuple[Phase, Call]]:
    """Gradients reduced, g P per step, and updated parameters gathered, w P, dense and experts apart.

    With the distributed optimizer gradients are reduce-scattered, and the shards of several instances
    all-reduced; without it all gradients are all-reduced. Without
    `overlap.param_gather` every DistributedOptimizer gathers all buffers of its chunks after its step, not
    its own alone; a rank with experts has one for them and one for the rest, so everything is gathered twice
    (distrib_optimizer.py, start_param_sync_for_bucket_group_subset).
    """
    parallel = recipe.parallel
    is_sharded = parallel.data_sharding != "none"
    is_quantized = recipe.low_precision is not None and recipe.low_precision.param_gather
    tensors_of = [chunk_tensors(recipe, chunk) for chunk in chunks]
    kinds = {tensor.in_expert_group for tensors in tensors_of for tensor in tensors}
    num_gathers = 1 if recipe.overlap.param_gather else len(kinds)
    for chunk, tensors in zip(chunks, tensors_of, strict=True):
        for in_expert_group in (False, True):
            group = Group.EXPERT_DATA if in_expert_group else Group.DATA_CONTEXT
            what = "experts" if in_expert_group else "dense parameters"
            for element_bytes, buffer in _buffers(recipe, tensors, in_expert_group, is_quantized):
                buckets = bucket_elements(
                    buffer,
                    num_shards=_num_shards(recipe, in_expert_group),
                    limit=bucket_limit(recipe, chunk),
                    is_padded=is_sharded,
                )
                for elements in buckets:
                    op = SCATTER if is_sharded else REDUCE
                    reduced = gradient_bytes(recipe) * elements
                    yield Phase.GRADIENT_SYNC, Call(op, group, reduced, what)
                    if is_sharded:
                        shard = reduced // _num_shards(recipe, in_expert_group)
                        yield Phase.GRADIENT_SYNC, Call(REDUCE, Group.INSTANCES, shard, what)
                        gathered = Call(GATHER, group, round(element_bytes * elements), what)
                        yield from ((Phase.PARAMETER_SYNC, gathered),) * num_gathers


def _fsdp_calls(recipe: Recipe, chunks: Sequence[Chunk]) -> Iterator[tuple[Phase, int, Call]]:
    """Megatron-FSDP, per buffer of P elements, padding included (`sharded_buffers`), and N micro batches.

    Gradients are reduce-scattered in the type in which they are added up, g P, after every backward pass, or
    once per step where they are not sharded (`optim`); over several optimizer instances the shards are
    all-reduced once. Weights, w P, are gathered for the forward and again for the backward pass of a layer in
    every micro batch (`optim_grads_params`: 2 N), everything else once per step: outside of layers nothing is
    freed (AllGatherPipeline.reset). What is fetched ahead is used, from the second step on: until then the
    last norm and the head fetch the first layers once more, in vain (megatron_fsdp.py,
    _pre_forward_param_unshard).
    """
    number = recipe.num_micro_batches
    num_reductions = 1 if recipe.parallel.fsdp_strategy == "optim" else number
    for buffer in (buffer for chunk in chunks for buffer in sharded_buffers(recipe, chunk)):
        group = Group.EXPERT_DATA if buffer.is_expert else Group.DATA_CONTEXT
        what = "experts" if buffer.is_expert else "dense parameters"
        gradient = gradient_bytes(recipe) * buffer.num_elements
        yield Phase.GRADIENT_SYNC, num_reductions, Call(SCATTER, group, gradient, what)
        held = gradient if num_reductions == 1 else gradient // buffer.num_shards
        yield Phase.GRADIENT_SYNC, 1, Call(REDUCE, Group.INSTANCES, held, what)
        element = FP8_BYTES if buffer.is_quantized else activation_element_bytes(recipe)
        gathered = Call(GATHER, group, element * buffer.num_elements, what)
        yield Phase.PARAMETER_SYNC, 2 * number if buffer.in_layer else 1, gathered


def _buffers(
    recipe: Recipe, tensors: Sequence[Tensor], in_expert_group: bool, is_quantized: bool
) -> Iterator[tuple[float, tuple[Tensor, ...]]]:
    """Buffers of one group with the bytes of their elements; quantized parameters have one of their own."""
    own = [tensor for tensor in tensors if tensor.in_expert_group == in_expert_group]
    plain = tuple(tensor for tensor in own if not (is_quantized and tensor.is_quantized))
    yield activation_element_bytes(recipe), plain
    if is_quantized:
        yield _STORED_BYTES[recipe.precision], tuple(tensor for tensor in own if tensor.is_quantized)


def _num_shards(recipe: Recipe, in_expert_group: bool) -> int:
    parallel = recipe.parallel
    num_ranks = parallel.expert_data if in_expert_group else parallel.dense_shards
    return max(1, num_ranks // parallel.num_optimizer_instances)


def _finalize_calls(recipe: Recipe, chunks: Sequence[Chunk]) -> Iterator[tuple[Phase, Call]]:
    """Sums that follow the last backward pass (finalize_model_grads.py): over TP, the gradients of weights
    that each rank applied to its own tokens; over the embedding group, those of the embedding's copies, g V H
    / TP; over all ranks of the stage, the tokens of each expert, a E per layer, where the expert bias moves
    (counted in the model's type, which Float16Module gives to the router's counters too).
    """
    model, parallel = recipe.model, recipe.parallel
    if parallel.data_sharding == "megatron_fsdp":
        num_bytes = FP32_BYTES * sum(_summed_in_shard(recipe, chunk, shard=0) for chunk in chunks)
    else:
        num_bytes = gradient_bytes(recipe) * sum(
            tensor.num_elements
            for chunk in chunks
            for tensor in chunk_tensors(recipe, chunk)
            if tensor.sums_over_tensor
        )
    what = "norms, routers and repeated projections"
    yield Phase.FINALIZE, Call(REDUCE, Group.TENSOR, num_bytes, what)
    ranks = embedding_pipeline_ranks(
        parallel, num_mtp_layers=recipe.num_mtp_layers, is_tied=model.tied_embeddings
    )
    if {chunk.pipeline_rank for chunk in chunks} & set(ranks):
        elements = model.vocab_size * model.hidden_size // parallel.tensor
        yield (
            Phase.FINALIZE,
            Call(REDUCE, Group.EMBEDDING, gradient_bytes(recipe) * elements, "copies of the embedding"),
        )
    if model.moe is not None and model.moe.router.expert_bias:
        num_expert_layers_of_mtp = sum(structure.ffn == "moe" for structure in model.mtp_layers)
        num_layers = sum(
            sum(map(model.is_moe_layer, chunk.layers))
            + model.num_mtp_modules(chunk.num_mtp_layers) * num_expert_layers_of_mtp
            for chunk in chunks
        )
        num_bytes = activation_element_bytes(recipe) * model.moe.num_experts * num_layers
        yield Phase.FINALIZE, Call(REDUCE, Group.TENSOR_DATA_CONTEXT, num_bytes, "tokens per expert")


def _summed_in_shard(recipe: Recipe, chunk: Chunk, *, shard: int) -> int:
    """Elements of a shard of Megatron-FSDP whose gradients are summed over TP, in the main weights' type.

    A rank sums what its shard holds of such weights (finalize_model_grads.py, `_local_tensor`), which may be
    nothing: they are small and stand last.
    """
    return sum(
        num_elements
        for buffer in sharded_buffers(recipe, chunk)
        for tensor, num_elements in buffer.in_shard(shard)
        if tensor.sums_over_tensor
    )
