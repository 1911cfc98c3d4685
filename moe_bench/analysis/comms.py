"""Bytes that one rank hands to collectives in one optimizer step, call by call, in closed form.

Left out: scalars (loss, gradient norm, token count), what moves once before the first step, and the tokens
that multi-token prediction shifts across context-parallel ranks (8 bytes per sequence and chunk). Routing is
taken to be balanced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from moe_bench.analysis.activations import activation_element_bytes, token_counts
from moe_bench.analysis.collectives import Call, Collective, Exchange, Group, Phase, group_size, sent_bytes
from moe_bench.analysis.layer_comms import (
    embedding_exchanges,
    layer_exchanges,
    loss_exchanges,
    mtp_exchanges,
    runs_quantized,
)
from moe_bench.analysis.state_comms import state_calls
from moe_bench.spec.pipeline import Chunk, embedding_pipeline_ranks
from moe_bench.spec.recipe import Recipe

SHAPE_BYTES = 24
"""Three int64 that announce a message where stages send tensors of different shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """Calls of one kind in one place over one optimizer step."""

    op: Collective
    group: Group
    group_size: int
    phase: Phase
    place: str
    """`decoder.<n>`, `mtp.<n>`, `embedding`, `output_layer`, or `-` for what belongs to no layer."""
    what: str
    num_calls: int
    num_bytes: int

    @property
    def sent_bytes(self) -> int:
        """What of it leaves the rank (`collectives.sent_bytes`)."""
        return sent_bytes(self.op, self.num_bytes, self.group_size)


def step_transfers(recipe: Recipe, pipeline_rank: int) -> tuple[Transfer, ...]:
    """Everything that a rank of pipeline rank `pipeline_rank` communicates in one step.

    Tensor-, context-, expert- and data-parallel peers carry the same, but for the ends of a ring and what a
    shard of Megatron-FSDP sums over TP: the first rank's are taken.
    """
    chunks = recipe.chunks()
    own = [chunk for chunk in chunks if chunk.pipeline_rank == pipeline_rank]
    sizes = _group_sizes(recipe)
    calls: list[tuple[Phase, str, int, Call]] = []
    for chunk in own:
        for place, exchanges, is_recomputed in _chunk_parts(recipe, chunk):
            for exchange in exchanges:
                for phase, call in _phases(exchange, is_recomputed(exchange)):
                    calls.append((phase, place, recipe.num_micro_batches, call))
    calls += [(Phase.PIPELINE, "-", number, call) for number, call in _messages(recipe, chunks, own)]
    calls += [(phase, "-", number, call) for phase, number, call in state_calls(recipe, own)]
    return _merged(calls, sizes)


def total_bytes(
    transfers: Iterable[Transfer], *, by: Callable[[Transfer], tuple[str, ...]]
) -> Mapping[tuple[str, ...], int]:
    """Bytes added up by a key, in order of first occurrence."""
    totals: dict[tuple[str, ...], int] = {}
    for transfer in transfers:
        key = by(transfer)
        totals[key] = totals.get(key, 0) + transfer.num_bytes
    return totals


def _group_sizes(recipe: Recipe) -> dict[Group, int]:
    ranks = embedding_pipeline_ranks(
        recipe.parallel, num_mtp_layers=recipe.num_mtp_layers, is_tied=recipe.model.tied_embeddings
    )
    sizes = {group: group_size(recipe.parallel, group) for group in Group if group is not Group.EMBEDDING}
    return sizes | {Group.EMBEDDING: len(ranks)}


def _merged(
    calls: Iterable[tuple[Phase, str, int, Call]], sizes: Mapping[Group, int]
) -> tuple[Transfer, ...]:
    """Calls of groups of two and more, added up where all but their bytes are equal."""
    merged: dict[tuple[Phase, str, Collective, Group, str], tuple[int, int]] = {}
    for phase, place, number, call in calls:
        if sizes[call.group] > 1 and number * call.num_bytes:
            key = (phase, place, call.op, call.group, call.what)
            num_calls, num_bytes = merged.get(key, (0, 0))
            merged[key] = (num_calls + number, num_bytes + number * call.num_bytes)
    return tuple(
        Transfer(
            op=op,
            group=group,
            group_size=sizes[group],
            phase=phase,
            place=place,
            what=what,
            num_calls=num_calls,
            num_bytes=num_bytes,
        )
        for (phase, place, op, group, what), (num_calls, num_bytes) in merged.items()
    )


def _phases(exchange: Exchange, is_recomputed: bool) -> Iterator[tuple[Phase, Call]]:
    """The calls of a part in the phases in which they are made.

    A recomputed part runs forward without autograd, and again with it.
    """
    if not (exchange.needs_grad and is_recomputed):
        yield from ((Phase.FORWARD, call) for call in exchange.forward)
    if is_recomputed:
        yield from ((Phase.RECOMPUTE, call) for call in exchange.forward)
    yield from ((Phase.BACKWARD, call) for call in exchange.backward)


def _chunk_parts(
    recipe: Recipe, chunk: Chunk
) -> Iterator[tuple[str, tuple[Exchange, ...], Callable[[Exchange], bool]]]:
    """Places of a chunk, what each exchanges per micro batch, and which of that is recomputed."""
    model, recompute = recipe.model, recipe.recompute
    modules = frozenset(recompute.modules if recompute.granularity == "selective" else ())

    def always(exchange: Exchange) -> bool:
        return True

    def selected(exchange: Exchange) -> bool:
        return bool(exchange.repeated_by & modules)

    if chunk.has_embedding:
        yield "embedding", embedding_exchanges(recipe), lambda exchange: False
    for index, layer in enumerate(chunk.layers):
        is_whole = recompute.granularity == "full" and (
            recompute.method == "uniform" or index < recompute.num_layers
        )
        exchanges = layer_exchanges(
            recipe.at(model.layer(layer)),
            is_moe=model.is_moe_layer(layer),
            is_quantized=runs_quantized(recipe, layer),
        )
        yield f"decoder.{layer}", exchanges, always if is_whole else selected
    # with method `block`, Megatron-Core recomputes no MTP module (multi_token_prediction.py)
    is_whole = recompute.granularity == "full" and recompute.method == "uniform"
    for index in range(chunk.num_mtp_layers):
        yield "embedding", embedding_exchanges(recipe), lambda exchange: False
        last = model.num_layers - 1
        exchanges = mtp_exchanges(recipe.at(model.layer(last)), is_moe=model.is_moe_layer(last))
        yield f"mtp.{index}", exchanges, always if is_whole else selected
    if chunk.has_loss:
        yield "output_layer", loss_exchanges(recipe), lambda exchange: False


def _messages(recipe: Recipe, chunks: tuple[Chunk, ...], own: list[Chunk]) -> Iterator[tuple[int, Call]]:
    """Hidden states sent on and gradients sent back, per micro batch and boundary between chunks.

    t H a, and as much again for each MTP module before the boundary, whose output travels along. Where MTP
    and loss stand on different chunks, every message is announced by its shape (p2p_communication.py).
    """
    num_bytes = token_counts(recipe).sharded * recipe.model.hidden_size * activation_element_bytes(recipe)
    number = recipe.num_micro_batches
    is_standalone = any(chunk.num_mtp_layers and not chunk.has_loss for chunk in chunks)
    for chunk in own:
        index = chunks.index(chunk)
        for boundary in (index - 1, index):
            if not 0 <= boundary < len(chunks) - 1:
                continue
            num_states = 1 + sum(before.num_mtp_layers for before in chunks[: boundary + 1])
            for op in (Collective.SEND, Collective.RECV):
                yield number, Call(op, Group.PIPELINE, num_states * num_bytes, "hidden states and gradients")
                if is_standalone:
                    yield number, Call(op, Group.PIPELINE, SHAPE_BYTES, "shapes")
