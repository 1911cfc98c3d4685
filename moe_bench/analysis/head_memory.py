"""What stands around the layers of a chunk: multi-token prediction's front, the final norm and the loss.

Megatron-Core 0.19.2, transformer/multi_token_prediction.py, models/gpt/gpt_model.py,
fusions/fused_cross_entropy.py; transformer_engine 2.20.2, pytorch/triton/cross_entropy.py.
"""

from __future__ import annotations

from moe_bench.analysis.layer_memory import Piece
from moe_bench.analysis.layer_sizes import FP32_BYTES, LayerSizes
from moe_bench.analysis.live_tensors import LiveTensors, Made
from moe_bench.spec.recipe import Recipe


def mtp_front(recipe: Recipe, sizes: LayerSizes) -> Piece:
    """The next token's embedding and the hidden state, normed, side by side, projected to one vector.

    The decoder's output, the embedding and both norms' outputs side by side stay: 4 a t H beside what comes
    in (_concat_embeddings).
    """
    vector = sizes.vector_bytes
    live = LiveTensors()
    live.place = "MTP projection"
    live.make("hidden", vector)
    live.make("decoder_output", vector)
    live.make("embedded", vector)
    live.make("embedded_norm", vector)
    live.make("hidden_norm", vector)
    live.make("side_by_side", 2 * vector)
    live.free("hidden_norm")
    live.make("layer_input", vector)
    live.free("embedded_norm")
    forward = live.peak
    live.free("layer_input")
    kept_bytes = live.num_bytes
    live.made = Made.BACKWARD
    live.make("grad_layer_input", vector)
    live.start_peak()
    live.make("grad_side_by_side", 2 * vector)
    weight = sizes.hidden_size // recipe.parallel.tensor, 2 * sizes.hidden_size
    live.pass_by(sizes.weight_gradient_bytes(weight))
    return Piece(kept_bytes, forward, live.peak)


def loss(recipe: Recipe, sizes: LayerSizes) -> Piece:
    """Final norm, logits and loss of every prediction, and their gradients.

    Of a T V / TP of logits stays: with Transformer Engine's loss a copy, which becomes their gradient; with
    Megatron-Core's fused one, and without fusion, the softmax in FP32. The gradients of the head from all
    predictions wait for each other and are added up.
    """
    fusion, num_predictions = recipe.kernels.fusions.cross_entropy, 1 + recipe.num_mtp_layers
    vocabulary = recipe.model.vocab_size // recipe.parallel.tensor
    logits = sizes.gathered_tokens * vocabulary
    logits_bytes = sizes.element_bytes * logits
    live = LiveTensors()
    live.place = "loss"
    live.make("hidden", sizes.vector_bytes)
    live.make("normed", sizes.vector_bytes)
    if num_predictions > 1:
        live.replace("normed", "all_normed", num_predictions * sizes.vector_bytes)
    for index in range(num_predictions):
        live.make("logits", logits_bytes)
        live.make(f"kept_{index}", logits_bytes if fusion == "te" else FP32_BYTES * logits)
        if fusion == "none":
            live.pass_by(FP32_BYTES * logits)
        live.free("logits")
    forward, kept_bytes = live.peak, live.num_bytes
    live.made = Made.BACKWARD
    live.start_peak()
    head_bytes = sizes.weight_gradient_bytes((vocabulary, sizes.hidden_size))
    for index in range(num_predictions):
        if fusion != "te":
            live.replace(f"kept_{index}", f"grad_logits_{index}", logits_bytes)
        _head_backward(live, sizes, index, head_bytes)
        live.free_if_held(f"kept_{index}", f"grad_logits_{index}")
    if num_predictions > 1:
        live.free("all_normed")
        live.pass_by(head_bytes)
    return Piece(kept_bytes, forward, live.peak)


def _head_backward(live: LiveTensors, sizes: LayerSizes, index: int, head_bytes: int) -> None:
    """The two gradients of the head's product for one prediction."""
    if sizes.is_split:
        live.make("grad_gathered", sizes.gathered_bytes)
    live.make(f"grad_normed_{index}", sizes.vector_bytes)
    live.make(f"grad_head_{index}", head_bytes)
    live.free_if_held("grad_gathered")
