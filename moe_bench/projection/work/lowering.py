"""A recipe as work: the kinds of layers it has, what each asks of a GPU, and how many stand on each chunk."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from moe_bench.analysis.activations import token_counts
from moe_bench.analysis.collectives import Exchange, Group
from moe_bench.analysis.layer_comms import (
    DENSE_MLP,
    TensorParallel,
    attention_exchanges,
    expert_exchanges,
    loss_exchanges,
    mtp_exchanges,
    runs_quantized,
    tensor_parallel,
)
from moe_bench.errors import BadInputError
from moe_bench.projection.work.attention import add_attention
from moe_bench.projection.work.compressed_attention import add_compressed_attention, add_stream_mixing
from moe_bench.projection.work.experts import add_dense_mlp, add_experts
from moe_bench.projection.work.operations import LayerWork, Message, Number, Part, Pass
from moe_bench.projection.work.state_space import add_gated_delta_net, add_mamba
from moe_bench.projection.work.tally import NUMBERS, Tally
from moe_bench.projection.work.traits import MEGATRON, Traits
from moe_bench.spec.model import LayerStructure
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe

_CROSS_ENTROPY_BYTES = {"te": 6, "native": 14, "none": 24}
"""Bytes moved per logit from the product to its gradient: Transformer Engine's kernel reads BF16 twice and
writes the gradient over it; Megatron-Core's own works on an FP32 copy, unfused step by step
(tensor_parallel/cross_entropy.py, fusions/fused_cross_entropy.py)."""
_ROUTED = (Group.EXPERT, Group.EXPERT_TENSOR, Group.EXPERT_TENSOR_EXPERT)
"""Groups whose messages grow with the tokens that a rank receives."""
_RESULTS = ("combine", "MLP output", "shared expert output")
_LOSS_LAUNCHES = 60
_MTP_LAUNCHES = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerKind:
    """What tells layers of one recipe apart in time."""

    structures: tuple[LayerStructure, ...]
    """What a token passes; several only in a prediction module of a hybrid model."""
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


def lower(recipe: Recipe, *, load: float = 1.0, traits: Traits = MEGATRON) -> Lowered:
    """The work of `recipe` per micro batch; `load` is what the slowest rank receives over the mean.

    Raises BadInputError for what has no rates (FP32).
    """
    if recipe.precision not in NUMBERS:
        raise BadInputError(
            f"{recipe.name}: precision {recipe.precision} is not projected; training in it is for smoke runs "
            f"on a CPU, choose one of {', '.join(NUMBERS)}"
        )
    chunks = recipe.chunks()
    works = tuple(
        ChunkWork(
            layers=Counter(_kinds(recipe, chunk, traits)),
            has_loss=chunk.has_loss,
            pipeline_rank=chunk.pipeline_rank,
        )
        for chunk in chunks
    )
    kinds = {kind for work in works for kind in work.layers}
    return Lowered(
        recipe=recipe,
        kinds={kind: _layer_work(recipe, kind, load, traits) for kind in sorted(kinds, key=repr)},
        loss=_loss_work(recipe),
        chunks=works,
    )


def _kinds(recipe: Recipe, chunk: Chunk, traits: Traits) -> Iterator[LayerKind]:
    model, recompute = recipe.model, recipe.recompute
    is_full = recompute.granularity == "full"
    for index, layer in enumerate(chunk.layers):
        yield LayerKind(
            structures=(model.layer(layer),),
            is_quantized=runs_quantized(recipe, layer),
            is_recomputed=is_full and (recompute.method == "uniform" or index < recompute.num_layers),
        )
    for _ in range(chunk.num_mtp_layers):
        yield LayerKind(
            structures=model.mtp_layers,
            is_quantized=traits.quantizes_mtp and runs_quantized(recipe, None),
            is_recomputed=is_full and recompute.method == "uniform",
            is_mtp=True,
        )


def _layer_work(recipe: Recipe, kind: LayerKind, load: float, traits: Traits) -> LayerWork:
    tally = Tally(
        recipe=recipe,
        number=NUMBERS[recipe.precision] if kind.is_quantized else Number.BF16,
        is_whole_recomputed=kind.is_recomputed,
        stops_early=traits.stops_recompute_early,
        fuses_attention=traits.fuses_attention,
        fuses_expert_biases=traits.fuses_expert_biases,
        bf16_parts=traits.bf16_parts,
    )
    if kind.is_mtp:
        rows, hidden = token_counts(recipe).gathered, recipe.model.hidden_size
        tally.gemm(Part.DENSE_MLP, rows, 2 * hidden, hidden / recipe.parallel.tensor)
        tally.launch(_MTP_LAUNCHES)
    exchanges: list[Exchange] = []
    parallel = tensor_parallel(recipe, is_quantized=kind.is_quantized)
    for structure in kind.structures:
        _add_mixer(tally, structure)
        _add_feed_forward(tally, structure, load)
        exchanges += _exchanges(recipe, structure, parallel)
    if kind.is_mtp:
        exchanges += mtp_exchanges(recipe, is_moe=False)[:2]
    messages = tuple(messages_of(tally, exchanges, load))
    num_collectives = sum(message.group is Group.TENSOR for message in messages)
    tally.launch_around(num_collectives=num_collectives * (recipe.parallel.tensor > 1))
    return LayerWork(operations=tuple(tally.operations), messages=messages, num_launches=tally.num_launches)


def _add_mixer(tally: Tally, structure: LayerStructure) -> None:
    model = tally.recipe.model
    if model.num_residual_streams > 1:
        for _ in range((structure.mixer is not None) + (structure.ffn is not None)):
            add_stream_mixing(tally, model.num_residual_streams)
    if structure.mixer == "compressed_attention" and model.compressed_attention is not None:
        add_compressed_attention(tally, model.compressed_attention, structure)
    elif structure.mixer == "attention":
        add_attention(tally, structure)
    elif structure.mixer == "mamba" and model.mamba is not None:
        add_mamba(tally, model.mamba)
    elif structure.mixer == "gated_delta_net" and model.gated_delta_net is not None:
        add_gated_delta_net(tally, model.gated_delta_net)


def _add_feed_forward(tally: Tally, structure: LayerStructure, load: float) -> None:
    moe = tally.recipe.model.at(structure).moe
    if structure.ffn == "moe" and moe is not None:
        add_experts(tally, moe, load=load)
    elif structure.ffn == "dense":
        add_dense_mlp(tally)


def _exchanges(recipe: Recipe, structure: LayerStructure, parallel: TensorParallel) -> Iterator[Exchange]:
    """A state-space mixer is split like an MLP: projections by columns in, by rows out."""
    hidden, moe = recipe.model.hidden_size, recipe.model.at(structure).moe
    if structure.mixer == "attention":
        yield from attention_exchanges(recipe, parallel)
    elif structure.mixer is not None:
        yield parallel.columns(hidden, "mixer input")
        yield parallel.rows(hidden, "mixer output")
    if structure.ffn == "moe" and moe is not None:
        yield from expert_exchanges(recipe, moe, parallel)
    elif structure.ffn == "dense":
        yield parallel.columns(hidden, "MLP input", DENSE_MLP)
        yield parallel.rows(hidden, "MLP output", DENSE_MLP)


def _loss_work(recipe: Recipe) -> LayerWork:
    """LM head and loss of every prediction; those of multi-token prediction stand with the main one."""
    tally = Tally(recipe=recipe, number=Number.BF16)
    for _ in range(1 + recipe.num_mtp_layers):
        _add_loss(tally)
    return LayerWork(
        operations=tuple(tally.operations),
        messages=tuple(messages_of(tally, loss_exchanges(recipe), 1.0)),
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


def messages_of(tally: Tally, exchanges: Iterable[Exchange], load: float) -> Iterator[Message]:
    """What the busiest rank exchanges: `load` times as much with its expert-parallel peers."""
    is_overlapped = tally.recipe.overlap.tensor_parallel
    for exchange in exchanges:
        passes = tally.forward_passes(exchange.repeated_by, is_last=_is_last(exchange))
        calls = [(in_pass, call) for in_pass in passes for call in exchange.forward]
        calls += [(Pass.DGRAD, call) for call in exchange.backward]
        for in_pass, call in calls:
            if call.num_bytes:
                yield Message(
                    op=call.op,
                    group=call.group,
                    in_pass=in_pass,
                    num_bytes=call.num_bytes * (load if call.group in _ROUTED else 1.0),
                    what=call.what,
                    is_overlapped=is_overlapped and call.group is Group.TENSOR,
                )


def _is_last(exchange: Exchange) -> bool:
    """Whether it carries a half layer's results, which no gradient asks for."""
    return any(call.what in _RESULTS for call in exchange.forward)
