"""Whole weights and gradients that Megatron-FSDP holds beside this rank's shards while layers run backward.

Megatron-Core 0.19.2, distributed/fsdp/src/megatron_fsdp: AllGatherPipeline and GradReducePipeline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from moe_bench.analysis.activations import activation_element_bytes
from moe_bench.analysis.fsdp import ShardedBuffer, sharded_buffers
from moe_bench.analysis.state_comms import gradient_bytes
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe

QUEUE_ELEMENTS = 1_000_000_000
"""Gradients that may wait to be reduced; twice a layer where that is more (megatron_fsdp.py,
suggested_communication_unit_size)."""


class InFlight(NamedTuple):
    """The most of each at once."""

    weights_bytes: int
    gradients_bytes: int
    """Without those of the experts at work, which the walk of their layer counts from the first one on."""


def fsdp_in_flight(recipe: Recipe, chunks: Sequence[Chunk]) -> InFlight:
    """Zero without Megatron-FSDP, and where it shards optimizer states alone (`optim`).

    Outside of layers everything is gathered once and stays. Of layers the one at work is whole and those that
    are fetched ahead until half the queue's size is reached. Gradients are taken buffer by buffer, experts
    before the rest of their layer, and let go when more than the queue's size waits; those outside of layers
    come first and go last.
    """
    parallel = recipe.parallel
    if parallel.data_sharding != "megatron_fsdp" or parallel.fsdp_strategy == "optim":
        return InFlight(0, 0)
    buffers = [buffer for chunk in chunks for buffer in sharded_buffers(recipe, chunk)]
    outside = sum(buffer.num_elements for buffer in buffers if not buffer.in_layer)
    # last layer first, and of each layer the experts first
    layers = [buffer for buffer in reversed(buffers) if buffer.in_layer]
    sizes = [buffer.num_elements for buffer in layers]
    per_layer = sum(sizes) // max(1, sum(not buffer.is_expert for buffer in layers))
    queue = max(QUEUE_ELEMENTS, 2 * per_layer)
    weights = 0
    if reduces_by_layer(recipe):
        weights = outside + _gathered(sizes, per_layer=per_layer, ahead=queue // 2)
    gradients = outside + _queued(layers, queue=queue)
    return InFlight(
        weights_bytes=activation_element_bytes(recipe) * weights,
        gradients_bytes=gradient_bytes(recipe) * gradients,
    )


def reduces_by_layer(recipe: Recipe) -> bool:
    """Whether each layer's gradients are in buffers of their own, taken when the first of them comes."""
    parallel = recipe.parallel
    return parallel.data_sharding == "megatron_fsdp" and parallel.fsdp_strategy == "optim_grads_params"


def _gathered(layers: Sequence[int], *, per_layer: int, ahead: int) -> int:
    """The layer at work and what is fetched for those that follow."""
    fetched = skipped = 0
    for num_elements in layers:
        if skipped < per_layer:
            skipped += num_elements
        elif fetched < ahead:
            fetched += num_elements
    return skipped + fetched


def _queued(layers: Sequence[ShardedBuffer], *, queue: int) -> int:
    """The most that waits to be reduced, with the buffer that is filled, if it is not one of experts."""
    waiting: list[int] = []
    most = 0
    for buffer in layers:
        most = max(most, sum(waiting) + (0 if buffer.is_expert else buffer.num_elements))
        while sum(waiting) > queue:
            waiting.pop(0)
        waiting.append(buffer.num_elements)
    return most
