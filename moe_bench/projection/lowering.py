"""A recipe as work: the kinds of layers it has, what each asks of a GPU, and how many stand on each chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moe_bench.analysis.activations import token_counts
from moe_bench.analysis.collectives import Exchange, Group
from moe_bench.analysis.layer_comms import layer_exchanges, loss_exchanges, mtp_exchanges, runs_quantized
from moe_bench.errors import BadInputError
from moe_bench.projection.attention_work import add_attention
from moe_bench.projection.expert_work import add_dense_mlp, add_experts
from moe_bench.projection.operations import LayerWork, Message, Number, Part, Pass
from moe_bench.projection.tally import NUMBERS, Tally
from moe_bench.spec.model import GroupedQueryAttention
from moe_bench.spec.pipeline import Chunk, pipeline_chunks
from moe_bench.spec.recipe import Recipe

_CROSS_ENTROPY_BYTES = {"te": 6, "native": 14, "none": 24}
"""Bytes moved per logit from the product to its gradient: Transformer Engine's kernel reads BF16 twice and
writes the gradient over it; Megatron-Core's own works on an FP32 copy, unfused step by step
(tensor_parallel/cross_entropy.py, fusions/fused_cross_entropy.py)."""
_ROUTED = (Group.EXPERT, Group.EXPERT_TENSOR, Group.EXPERT_TENSOR_EXPERT)
"""Groups whose messages grow with the tokens that a rank receives."""
_LOSS_LAUNCHES = 60
_MTP_LAUNCHES = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What tells layers of one recipe apart in time."""

    is_moe: bool
    window_tokens: int | None
    is_quantized: bool
    is_recomputed: bool
    """Whether the whole layer runs forward again in the backward pass."""
    is_mtp: bool = False
    """A multi-token prediction module: a layer with a projection before it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkWork:
    """One model chunk."""

    layers: Mapping[LayerKind, int]
    has_loss: bool
    pipeline_rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Lowered:
    """All that the projection needs to know about the layers of a recipe."""

    recipe: Recipe
    kinds: Mapping[LayerKind, LayerWork]
    loss: LayerWork
    chunks: tuple[ChunkWork, ...]
    """In model order."""


def lower(recipe: Recipe, *, load: float = 1.0) -> Lowered:
    """The work of `recipe` per micro batch; `load` is what the slowest rank receives over the mean.

    Raises BadInputError for what has no rates (FP32).
    """
    if recipe.precision not in NUMBERS:
        raise BadInputError(
            f"{recipe.name}: precision {recipe.precision} is not projected; training in it is for smoke runs "
            f"on a CPU, choose one of {', '.join(NUMBERS)}"
        )
    model = recipe.model
    chunks = pipeline_chunks(
        recipe.parallel, num_layers=model.num_layers, num_mtp_layers=recipe.num_mtp_layers
    )
    works = tuple(
        ChunkWork(
            layers=Counter(_kinds(recipe, chunk)), has_loss=chunk.has_loss, pipeline_rank=chunk.pipeline_rank
        )
        for chunk in chunks
    )
    kinds = {kind for work in works for kind in work.layers}
    return Lowered(
        recipe=recipe,
        kinds={kind: _layer_work(recipe, kind, load) for kind in sorted(kinds, key=repr)},
        loss=_loss_work(recipe),
        chunks=works,
    )


def _kinds(recipe: Recipe, chunk: Chunk) -> Iterator[LayerKind]:
    model, recompute = recipe.model, recipe.recompute
    is_full = recompute.granularity == "full"
    for index, layer in enumerate(chunk.layers):
        yield LayerKind(
            is_moe=model.is_moe_layer(layer),
            window_tokens=_window_tokens(recipe, layer),
            is_quantized=runs_quantized(recipe, layer),
            is_recomputed=is_full and (recompute.method == "uniform" or index < recompute.num_layers),
        )
    for _ in range(chunk.num_mtp_layers):
        yield LayerKind(
            is_moe=model.is_moe_layer(model.num_layers - 1),
            window_tokens=None,
            is_quantized=runs_quantized(recipe, None),
            is_recomputed=is_full and recompute.method == "uniform",
            is_mtp=True,
        )


def _window_tokens(recipe: Recipe, layer: int) -> int | None:
    attention = recipe.model.attention
    if not isinstance(attention, GroupedQueryAttention) or attention.sliding_window is None:
        return None
    window = attention.sliding_window
    is_full = (layer + 1) % window.full_attention_every == 0
    return None if is_full or window.window_tokens >= recipe.seq_len else window.window_tokens


def _layer_work(recipe: Recipe, kind: LayerKind, load: float) -> LayerWork:
    tally = Tally(
        recipe=recipe,
        number=NUMBERS[recipe.precision] if kind.is_quantized else Number.BF16,
        is_whole_recomputed=kind.is_recomputed,
    )
    moe = recipe.model.moe
    add_attention(tally, window_tokens=kind.window_tokens)
    if kind.is_moe and moe is not None:
        add_experts(tally, moe, load=load)
    else:
        add_dense_mlp(tally)
    if kind.is_mtp:
        rows, hidden = token_counts(recipe).gathered, recipe.model.hidden_size
        tally.gemm(Part.DENSE_MLP, rows, 2 * hidden, hidden / recipe.parallel.tensor)
        tally.launch(_MTP_LAUNCHES)
        exchanges = mtp_exchanges(recipe, is_moe=kind.is_moe)
    else:
        exchanges = layer_exchanges(recipe, is_moe=kind.is_moe, is_quantized=kind.is_quantized)
    return LayerWork(
        operations=tuple(tally.operations),
        messages=tuple(_messages(tally, exchanges, load)),
        num_launches=tally.num_launches,
    )


def _loss_work(recipe: Recipe) -> LayerWork:
    """LM head and loss of every prediction; those of multi-token prediction stand with the main one."""
    tally = Tally(recipe=recipe, number=Number.BF16)
    for _ in range(1 + recipe.num_mtp_layers):
        _add_loss(tally)
    return LayerWork(
        operations=tuple(tally.operations),
        messages=tuple(_messages(tally, loss_exchanges(recipe), 1.0)),
        num_launches=tally.num_launches,
    )


def _add_loss(tally: Tally) -> None:
    """LM head over this rank's share of the vocabulary, in BF16, and the cross entropy of its logits."""
    recipe = tally.recipe
    rows, columns = token_counts(recipe).gathered, recipe.model.vocab_size / recipe.parallel.tensor
    tally.gemm(Part.LM_HEAD, rows, recipe.model.hidden_size, columns, number=Number.BF16)
    moved = _CROSS_ENTROPY_BYTES[recipe.kernels.fusions.cross_entropy] * rows * columns
    tally.move(Part.LM_HEAD, forward_bytes=moved / 2, backward_bytes=moved / 2)
    tally.launch(_LOSS_LAUNCHES)


def _messages(tally: Tally, exchanges: tuple[Exchange, ...], load: float) -> Iterator[Message]:
    """What the busiest rank exchanges: `load` times as much with its expert-parallel peers."""
    is_overlapped = tally.recipe.overlap.tensor_parallel
    for exchange in exchanges:
        passes = tally.forward_passes(exchange.repeated_by)
        calls = [(in_pass, call) for in_pass in passes for call in exchange.forward]
        calls += [(Pass.DGRAD, call) for call in exchange.backward]
        for in_pass, call in calls:
            if call.num_bytes:
                yield Message(
                    op=call.op,
                    group=call.group,
                    in_pass=in_pass,
                    num_bytes=call.num_bytes * (load if call.group in _ROUTED else 1.0),
                    is_overlapped=is_overlapped and call.group is Group.TENSOR,
                )
