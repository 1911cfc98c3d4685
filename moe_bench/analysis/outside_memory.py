"""What a rank needs at most outside of torch's allocator, or inside of it where nothing else can use it."""

from __future__ import annotations

from collections.abc import Sequence

from moe_bench.analysis.dispatch_buffers import dispatch_buffer_bytes
from moe_bench.analysis.layer_sizes import layer_sizes
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe


def outside_bytes(recipe: Recipe, chunks: Sequence[Chunk], *, passing_bytes: int) -> int:
    """The dispatcher's buffers and what CUDA graphs add to the rank of `chunks`.

    `passing_bytes` is what forward and backward passes hold at the fullest moment. Buffers whose size no
    source gives are left out.
    """
    return buffer_bytes(recipe) + graph_bytes(recipe, chunks, passing_bytes=passing_bytes)


def buffer_bytes(recipe: Recipe) -> int:
    """The dispatcher's, where there is anybody to send to."""
    if recipe.parallel.expert == 1:
        return 0
    return dispatch_buffer_bytes(recipe) or 0


def graph_bytes(recipe: Recipe, chunks: Sequence[Chunk], *, passing_bytes: int) -> int:
    """Of CUDA graphs: static tensors of captured layers, or what one graph per iteration cannot use.

    Graphs of layers keep an input of their own and both its gradients, 3 a t H each (transformer_engine
    2.20.2, pytorch/graph.py). For one per iteration, what the iterations before the capture leave in the
    allocator is of no use to its private pool: 60.9 GB inactive after the first where the next allocation
    fails (NVIDIA-NeMo/Megatron-Bridge #4587), and no size of the model fits a B200 (#5356).
    """
    graphs = recipe.cuda_graphs
    if graphs.implementation == "full_iteration":
        return passing_bytes
    if graphs.implementation == "none" or (graphs.modules and "attn" not in graphs.modules):
        return 0
    num_layers = sum(len(chunk.layers) + chunk.num_mtp_layers for chunk in chunks)
    return 3 * layer_sizes(recipe).vector_bytes * num_layers
