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
    layers = _backward_order(buffers)
    per_layer = sum(layers) // max(1, sum(not b.is_expert for b in buffers if b.in_layer))
    queue = max(QUEUE_ELEMENTS, 2 * per_layer)
    weights = 0
    if parallel.fsdp_strategy == "optim_grads_params":
        weights = outside + _gathered(layers, per_layer=per_layer, ahead=queue // 2)
    gradients = outside + _queued(layers, queue=queue)
    return InFlight(
        weights_bytes=activation_element_bytes(recipe) * weights,
        gradients_bytes=gradient_bytes(recipe) * gradients,
    )


def _backward_order(buffers: Sequence[ShardedBuffer]) -> list[int]:
    """Elements of the layers' buffers, last layer first, and of each layer the experts first."""
    return [buffer.num_elements for buffer in reversed(buffers) if buffer.in_layer]


def _gathered(layers: Sequence[int], *, per_layer: int, ahead: int) -> int:
    """The layer at work and what is fetched for those that follow."""
    fetched = skipped = 0
    for num_elements in layers:
        if skipped < per_layer:
            skipped += num_elements
        elif fetched < ahead:
            fetched += num_elements
    return skipped + fetched


def _queued(layers: Sequence[int], *, queue: int) -> int:
    """The most that waits to be reduced, with the buffer that is filled."""
    waiting: list[int] = []
    most = held = 0
    for num_elements in layers:
        held += num_elements
        most = max(most, held)
        while sum(waiting) > queue:
            held -= waiting.pop(0)
        waiting.append(num_elements)
    return most
