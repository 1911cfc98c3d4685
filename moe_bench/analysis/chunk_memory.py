"""What one model chunk holds: its layers, multi-token prediction, the final norm and the loss, in order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moe_bench.analysis import head_memory
from moe_bench.analysis.kept_memory import kept_on_device
from moe_bench.analysis.layer_memory import LayerMemory, LayerWalk, Piece
from moe_bench.analysis.layer_sizes import layer_sizes, permutes_in_triton
from moe_bench.analysis.live_tensors import NOTHING, Held, Instant, fullest
from moe_bench.spec.model import ExpertStep, LayerStructure, MixtureOfExperts
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe


class Lingering(NamedTuple):
    """What stays of one chunk's backward passes until the chunk runs forward again.

    Dispatchers hold the last probabilities and row maps (token_dispatcher.py), and through the probabilities
    a graph.
    """

    num_layers: int
    """Expert layers whose recomputation leaves `per_layer`."""
    per_layer: Held
    after_last: Held
    """Besides the chunk's input and its gradient, once no micro batch of the chunk is in flight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkMemory:
    """One chunk and micro batch; figures are above what was held before the chunk's input."""

    chunk: Chunk
    pieces: tuple[Piece, ...]
    kept_bytes: int
    """From the forward to the backward pass; the output, which goes to the next stage, is not in it."""
    output_bytes: int
    """Until it has been sent; 0 with the loss."""
    forward: Instant
    backward: Instant
    """Beside nothing that lingers of an earlier backward pass."""
    first_backward: Instant
    """With what lingers of the layers that this pass has been through, growing layer by layer."""
    lingering: Lingering

    def layers(self) -> tuple[tuple[int, LayerMemory], ...]:
        """Each layer with what the pieces before it keep."""
        found, base = [], 0
        for piece in self.pieces:
            if piece.layer is not None:
                found.append((base, piece.layer))
            base += piece.kept_bytes
        return tuple(found)

    def loss(self) -> tuple[int, Piece] | None:
        """The loss with what the pieces before it keep."""
        if not self.chunk.has_loss:
            return None
        return self.kept_bytes - self.pieces[-1].kept_bytes, self.pieces[-1]


class LayerKind(NamedTuple):
    """What tells apart the layers that differ in memory."""

    is_moe: bool
    step: ExpertStep | None = None
    """Of its experts, where they are not those of the first expert layers."""

    @classmethod
    def of(cls, structure: LayerStructure) -> LayerKind:
        """The kind of one layer."""
        return cls(structure.ffn == "moe", structure.step)

    def seen_by(self, recipe: Recipe) -> Recipe:
        """`recipe` as if every layer were of this kind."""
        return recipe.at(
            LayerStructure(mixer="attention", ffn="moe" if self.is_moe else "dense", step=self.step)
        )

    def moe_of(self, recipe: Recipe) -> MixtureOfExperts | None:
        """Its experts; None for a dense layer."""
        return self.seen_by(recipe).model.moe if self.is_moe else None


class ModelMemory:
    """Chunks of one recipe; each kind of layer and of chunk is walked once.

    `load` is what its rank receives for its experts over the mean of the ranks, in every layer.
    """

    def __init__(self, recipe: Recipe, *, load: float = 1.0) -> None:
        self.recipe = recipe
        self._load = load
        self.sizes = layer_sizes(recipe)
        self._layers: dict[tuple[LayerKind, bool], LayerMemory] = {}
        self._chunks: dict[tuple[object, ...], ChunkMemory] = {}

    def layer(self, *, is_moe: bool, is_recomputed: bool) -> LayerMemory:
        """One kind of layer, kept whole or brought back by recomputation; its experts those of the first."""
        return self.layer_of(LayerKind(is_moe), is_recomputed=is_recomputed)

    def layer_of(self, kind: LayerKind, *, is_recomputed: bool) -> LayerMemory:
        """The same, of any step."""
        key = kind, is_recomputed
        if key not in self._layers:
            recipe = kind.seen_by(self.recipe)
            walk = LayerWalk(recipe, self.sizes, is_moe=kind.is_moe, load=self._load)
            memory = walk.memory(is_recomputed=is_recomputed)
            if not is_recomputed:
                kept = kept_on_device(self.recipe, memory.kept, is_moe=memory.has_experts)
                memory = replace(memory, kept=kept)
            self._layers[key] = memory
        return self._layers[key]

    def chunk(self, chunk: Chunk) -> ChunkMemory:
        """All of one chunk."""
        kinds = tuple(LayerKind.of(self.recipe.model.layer(layer)) for layer in chunk.layers)
        key = kinds, chunk.num_mtp_layers, chunk.has_embedding, chunk.has_loss
        if key not in self._chunks:
            self._chunks[key] = self._chunk(chunk, kinds)
        return replace(self._chunks[key], chunk=chunk)

    def _chunk(self, chunk: Chunk, kinds: Sequence[LayerKind]) -> ChunkMemory:
        pieces = tuple(self._pieces(chunk, kinds))
        lingering = self._lingering(kinds, num_mtp=chunk.num_mtp_layers)
        # a chunk may be the embedding alone
        forward, backward, first_backward = ([Instant(NOTHING, "embedding")] for _ in range(3))
        base, num_above = 0, lingering.num_layers
        for piece in pieces:
            forward.append(piece.forward.plus(base))
            backward.append(piece.backward.plus(base))
            num_above -= piece.layer is not None and piece.layer.has_experts
            above = lingering.per_layer.times(max(0, num_above))
            first_backward.append(backward[-1].beside(above))
            base += piece.kept_bytes
        return ChunkMemory(
            chunk=chunk,
            pieces=pieces,
            kept_bytes=base,
            output_bytes=0 if chunk.has_loss else self.sizes.vector_bytes * (1 + chunk.num_mtp_layers),
            forward=fullest(*forward),
            backward=fullest(*backward),
            first_backward=fullest(*first_backward),
            lingering=lingering,
        )

    def _lingering(self, kinds: Sequence[LayerKind], *, num_mtp: int) -> Lingering:
        """A graph that was recomputed ends at the input of the recomputation, a leaf with its gradient.

        That is the layer's input with full recomputation, the norm's output with `moe`
        (tensor_parallel/random.py, CheckpointFunction.backward). Where parts of a layer are called apart,
        each layer's input is such a leaf. Otherwise the last micro batch's graph ends at the chunk's input,
        and the row maps, 4 t (2 E + 1), and the routing map, t E, stay. All of it hangs on the probabilities
        that Megatron-Core's dispatcher holds on; ours lets them go.
        """
        recipe, vector = self.recipe, self.sizes.vector_bytes
        num_layers, num_moe = len(kinds), sum(kind.is_moe for kind in kinds)
        if permutes_in_triton(recipe):
            leaves = vector * (num_layers + num_mtp) if recipe.overlap.expert_parallel else 0
            return Lingering(0, NOTHING, Held(leaves, 0, leaves))
        if recipe.recompute.granularity == "full":
            return Lingering(num_moe + num_mtp, Held(vector, 0, vector), NOTHING)
        if "moe" in self.sizes.recomputes:
            return Lingering(num_moe + num_mtp, Held(0, vector, vector), NOTHING)
        with_experts = [*filter(None, (kind.moe_of(recipe) for kind in kinds))]
        with_experts += [*filter(None, [LayerKind.of(recipe.model.mtp_layers[0]).moe_of(recipe)])] * num_mtp
        maps = self.sizes.sharded_tokens * sum(9 * moe.num_experts + 4 for moe in with_experts)
        leaves = vector * (num_layers + num_mtp) if recipe.overlap.expert_parallel else 0
        return Lingering(0, NOTHING, Held(maps + leaves, 0, leaves))

    def _pieces(self, chunk: Chunk, kinds: Sequence[LayerKind]) -> Iterator[Piece]:
        model, recompute = self.recipe.model, self.recipe.recompute
        yield from self._layer_pieces(kinds)
        for _ in range(chunk.num_mtp_layers):
            yield head_memory.mtp_front(self.recipe, self.sizes)
            kind = LayerKind.of(model.layer(model.num_layers - 1))
            yield self.layer_of(kind, is_recomputed=recompute.granularity == "full").piece
        if chunk.has_loss:
            yield head_memory.loss(self.recipe, self.sizes)

    def _layer_pieces(self, kinds: Sequence[LayerKind]) -> Iterator[Piece]:
        recompute = self.recipe.recompute
        if recompute.granularity == "full" and recompute.method == "uniform":
            length = max(1, recompute.num_layers)
            for first in range(0, len(kinds), length):
                yield self._unit(kinds[first : first + length])
            return
        num_recomputed = recompute.num_layers if recompute.granularity == "full" else 0
        num_offloaded = self.recipe.offload.num_activation_layers
        for index, kind in enumerate(kinds):
            piece = self.layer_of(kind, is_recomputed=index < num_recomputed).piece
            yield replace(piece, kept_bytes=0) if index < num_offloaded else piece

    def _unit(self, kinds: Sequence[LayerKind]) -> Piece:
        """Layers that are recomputed together: the input of the first alone is kept."""
        alone = [self.layer_of(kind, is_recomputed=True) for kind in kinds]
        if len(alone) == 1:
            return alone[0].piece
        vector_bytes = self.sizes.vector_bytes
        base, backward = -vector_bytes, []
        for kind in kinds:
            layer = self.layer_of(kind, is_recomputed=False)
            again = Held(vector_bytes, base + layer.forward.held.total_bytes, vector_bytes)
            backward.append(Instant(again, layer.forward.place))
            held = layer.backward.held
            brought = base + held.activations_bytes + held.recomputed_bytes
            backward.append(Instant(Held(vector_bytes, brought, held.backward_bytes), layer.backward.place))
            base += layer.kept_bytes
        forward = fullest(*(layer.forward for layer in alone))
        return Piece(vector_bytes, forward, fullest(*backward))
