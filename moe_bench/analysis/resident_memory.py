"""What a rank holds beside its states whichever pass runs, each term once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from moe_bench.analysis.activations import activation_element_bytes
from moe_bench.analysis.chunk_memory import LayerKind, ModelMemory
from moe_bench.analysis.layer_sizes import INDEX_BYTES, Weight, expert_sizes
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe


def resident_bytes(recipe: Recipe, chunks: Sequence[Chunk], model: ModelMemory) -> int:
    """All of the terms below for one rank's chunks."""
    return (
        gather_buffer_bytes(model, chunks)
        + sum(dispatcher_bytes(kind.seen_by(recipe), model) for kind in _kinds(recipe, chunks) if kind.is_moe)
        + rotary_bytes(recipe, chunks)
        + dummy_gradient_bytes(recipe, chunks, model)
    )


def gather_buffer_bytes(model: ModelMemory, chunks: Sequence[Chunk]) -> int:
    """Where column-parallel products gather the sequence: a T H, twice as wide for MTP's projection.

    Megatron-Core keeps one buffer (tensor_parallel/layers.py, get_global_memory_buffer, "mpu"). Transformer
    Engine's products make one each, and let it go.
    """
    if not model.sizes.is_split:
        return 0
    return model.sizes.gathered_bytes * (2 if any(chunk.num_mtp_layers for chunk in chunks) else 1)


def dispatcher_bytes(recipe: Recipe, model: ModelMemory) -> int:
    """What the dispatcher of one expert layer holds on (token_dispatcher.py): probabilities, 4 t E.

    Where the layer is recomputed, the forward pass leaves its routing map, t E, and row map, 4 t (2 E + 1),
    too, which otherwise are those of a micro batch in flight. torch's permutation keeps the probabilities
    itself; where nothing is permuted, or by our own kernels, the dispatcher keeps nothing.
    """
    moe, sizes = recipe.model.moe, model.sizes
    if moe is None:
        return 0
    experts = expert_sizes(recipe, moe, sizes)
    held = experts.scores_bytes if experts.permutes in ("fused", "after") else 0
    if experts.permutes == "never" or experts.dispatcher_lets_go:
        return 0
    if recipe.recompute.granularity == "full" or "moe" in sizes.recomputes:
        held += sizes.sharded_tokens * (moe.num_experts + INDEX_BYTES * (2 * moe.num_experts + 1))
    return held


def rotary_bytes(recipe: Recipe, chunks: Sequence[Chunk]) -> int:
    """Rotary angles in FP32: 4 S d of each chunk, or with MLA of each layer.

    Megatron-Core 0.19.2, models/common/embeddings: rotary_pos_embedding.py caches its result, and
    yarn_rotary_pos_embedding.py BF16 cosines and sines as well: 8 S d_r. MLA has one per layer.
    """
    attention, rope = recipe.model.attention, recipe.model.rope
    positions = recipe.seq_len // recipe.parallel.context
    if attention.kind == "mla":
        num_layers = sum(len(chunk.layers) + chunk.num_mtp_layers for chunk in chunks)
        element = 8 if rope.scaling is not None else 4
        return element * positions * attention.qk_rope_head_dim * num_layers
    return 4 * positions * round(attention.head_dim * rope.rotary_fraction) * len(chunks)


def dummy_gradient_bytes(recipe: Recipe, chunks: Sequence[Chunk], model: ModelMemory) -> int:
    """What products that add weight gradients to the buffer themselves hand to autograd instead.

    One tensor, a per weight, for every shape of weights, made once and never let go: transformer_engine
    2.20.2 pytorch/module/base.py, get_dummy_wgrad. Megatron-Core's head takes one, too; routers have none.
    """
    if not recipe.kernels.fusions.gradient_accumulation or recipe.kernels.family != "transformer_engine":
        return 0
    weights: set[Weight] = set()
    for kind in set(_kinds(recipe, chunks)):
        weights |= model.layer_of(kind, is_recomputed=False).weights
    if any(chunk.has_loss for chunk in chunks):
        weights.add((recipe.model.vocab_size // recipe.parallel.tensor, recipe.model.hidden_size))
    return activation_element_bytes(recipe) * sum(rows * columns for rows, columns in weights)


def _kinds(recipe: Recipe, chunks: Sequence[Chunk]) -> Iterator[LayerKind]:
    """Every layer's, those of prediction modules included."""
    last = recipe.model.num_layers - 1
    for chunk in chunks:
        layers = (*chunk.layers, *(last,) * chunk.num_mtp_layers)
        yield from (LayerKind.of(recipe.model.layer(layer)) for layer in layers)
