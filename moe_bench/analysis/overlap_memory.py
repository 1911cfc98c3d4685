"""The fullest moment of a forward and a backward pass that run layer by layer beside one another.

Megatron-Core 0.19.2, models/common/model_chunk_schedule_plan.py, TransformerLayerSchedulePlan.run. For each
pair of layers: combine backward, attention forward, experts backward, dispatch forward, dispatch backward,
experts forward, combine forward, attention backward.
"""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.analysis.chunk_memory import ChunkMemory
from moe_bench.analysis.layer_memory import LayerMemory
from moe_bench.analysis.live_tensors import Held, Instant, fullest

LEAF_GRADIENTS = 3
"""Vectors: parts of a layer are called apart, and the input of each is a leaf with a gradient of its own
(fine_grained_callables.py); of the chunk's output, its copy, and the layer's at work."""


def overlapped_instant(ahead: ChunkMemory, behind: ChunkMemory, *, vector_bytes: int) -> Instant:
    """Forward through `ahead`, backward through `behind`; above what both found."""
    return fullest(*_instants(ahead, behind, vector_bytes))


def _instants(ahead: ChunkMemory, behind: ChunkMemory, vector_bytes: int) -> Iterator[Instant]:
    forward, backward = ahead.layers(), behind.layers()
    if (loss := behind.loss()) is not None:
        base, piece = loss
        yield piece.backward.plus(base + vector_bytes)
    num_pairs = min(len(forward), len(backward))
    top_bytes = backward[-1][1].dispatched_bytes if backward else 0
    for index in range(num_pairs):
        there, back = forward[index], backward[-1 - index]
        held_by_plan = Held(0, 0, LEAF_GRADIENTS * vector_bytes + (top_bytes if index else 0))
        for instant in _pair(there[1], back[1], vector_bytes):
            yield instant.plus(there[0] + back[0]).beside(held_by_plan)
    for base, layer in backward[: len(backward) - num_pairs]:
        yield layer.backward.plus(base + sum(layer.kept_bytes for _, layer in forward))
    for base, layer in forward[num_pairs:]:
        yield layer.forward.plus(base)
    if (loss := ahead.loss()) is not None:
        base, piece = loss
        yield piece.forward.plus(base)


def _pair(ahead: LayerMemory, behind: LayerMemory, vector_bytes: int) -> Iterator[Instant]:
    """Experts backward, experts forward, attention backward of one pair of layers."""
    rows = Held(ahead.before_dispatch_bytes + ahead.dispatched_bytes, 0, behind.dispatched_bytes)
    yield behind.mlp_backward.beside(rows)
    waiting = Held(behind.before_dispatch_bytes, 0, behind.dispatched_bytes + vector_bytes)
    yield ahead.forward.beside(waiting)
    done = Held(ahead.kept_bytes + vector_bytes, 0, behind.dispatched_bytes)
    yield behind.attention_backward.beside(done)
