"""What one layer leaves behind per micro batch, and the most that it holds forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_bench.analysis.attention_memory import AttentionHalf
from moe_bench.analysis.expert_memory import EXPERT_TENSORS, ExpertHalf
from moe_bench.analysis.layer_sizes import LayerSizes, Weight
from moe_bench.analysis.live_tensors import Instant, LiveTensors, Made, fullest
from moe_bench.analysis.mlp_memory import DenseHalf
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a chunk that runs as one; figures are above what was held before its input."""

    kept_bytes: int
    """From its forward to its backward pass, with its input, without its output."""
    forward: Instant
    backward: Instant
    layer: LayerMemory | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerMemory:
    """One kind of layer; figures are above what was held before the layer's input."""

    kept: Mapping[str, int]
    """Bytes from the forward pass to the backward pass by tensor, the layer's input included."""
    forward: Instant
    mlp_backward: Instant
    """The fullest moment of the second half's backward pass, which comes first."""
    attention_backward: Instant
    dispatched_bytes: int
    """Rows on their way to experts and back; 0 without experts."""
    has_experts: bool
    weights: frozenset[Weight]
    """Shapes of the weights of its products."""
    kept_bytes: int = field(init=False)
    before_dispatch_bytes: int = field(init=False)
    """The part that stands before rows leave, and until their gradients are back."""
    piece: Piece = field(init=False)

    def __post_init__(self) -> None:
        """Add up once what every micro batch and chunk asks for."""
        kept_bytes = sum(self.kept.values())
        expert_bytes = sum(size for name, size in self.kept.items() if name in EXPERT_TENSORS)
        object.__setattr__(self, "kept_bytes", kept_bytes)
        object.__setattr__(self, "before_dispatch_bytes", kept_bytes - expert_bytes)
        object.__setattr__(self, "piece", Piece(kept_bytes, self.forward, self.backward, self))

    @property
    def backward(self) -> Instant:
        """The fullest moment of the backward pass."""
        return fullest(self.attention_backward, self.mlp_backward)


class LayerWalk:
    """Walks one kind of layer through its passes."""

    def __init__(self, recipe: Recipe, sizes: LayerSizes, *, is_moe: bool, load: float = 1.0) -> None:
        self._sizes = sizes
        self._attention = AttentionHalf(recipe, sizes)
        moe = recipe.model.moe
        self._mlp: DenseHalf | ExpertHalf = (
            ExpertHalf(recipe, moe, sizes, load=load)
            if is_moe and moe is not None
            else DenseHalf(recipe, sizes)
        )

    def memory(self, *, is_recomputed: bool) -> LayerMemory:
        """All passes; `is_recomputed` keeps the input alone and runs the forward pass again before the
        backward one.
        """
        live = LiveTensors()
        live.make("layer_input", self._sizes.vector_bytes)
        if is_recomputed:
            forward, kept = self._forward_without_graph(), live.sizes
            live.made = Made.RECOMPUTE
        self._attention.forward(live)
        self._mlp.forward(live)
        if is_recomputed:
            live.replace("layer_output", "output_again", self._sizes.vector_bytes)
        else:
            forward = live.peak
            live.free("layer_output")
            kept = live.sizes
            live.start_peak()
        live.made = Made.BACKWARD
        live.make("grad_layer_output", self._sizes.vector_bytes)
        self._mlp.backward(live)
        mlp_backward = live.peak
        live.start_peak()
        self._attention.backward(live)
        attention_backward = live.peak
        live.free("grad_layer_input")
        live.free_if_held("output_again")
        if live.num_bytes:
            raise ValueError(f"the backward pass leaves {', '.join(live.sizes)}")
        return LayerMemory(
            kept=kept,
            forward=forward,
            mlp_backward=mlp_backward,
            attention_backward=attention_backward,
            dispatched_bytes=self._mlp.dispatched_bytes,
            has_experts=isinstance(self._mlp, ExpertHalf),
            weights=frozenset((*self._attention.weights, *self._mlp.weights)),
        )

    def _forward_without_graph(self) -> Instant:
        """The forward pass of a layer that is recomputed later: it saves nothing but local variables."""
        live = LiveTensors()
        live.make("layer_input", self._sizes.vector_bytes)
        self._attention.forward(live)
        live.free(*(name for name in live.sizes if name not in ("layer_input", "mlp_input")))
        self._mlp.forward_without_graph(live)
        return live.peak
