"""What the expert half of a layer holds while it runs forward and backward, tensor by tensor.

Read from Megatron-Core 0.19.2, transformer/moe/moe_layer.py, token_dispatcher.py, router.py and moe_utils.py,
and harness/kernels/experts.py, in the order of their operators. Rows that are sent and received are local
variables of MoELayer.forward and stay until it ends, or where parts of a layer are called apart, until the
part ends.
"""

from __future__ import annotations

from moe_bench.analysis.activations import keeps_experts_row_wise, multiplies_experts_row_wise
from moe_bench.analysis.gathered_memory import GatheredProducts
from moe_bench.analysis.layer_sizes import FP32_BYTES, ExpertSizes, LayerSizes, Weight, expert_sizes
from moe_bench.analysis.live_tensors import LiveTensors, Made
from moe_bench.analysis.mlp_memory import Mlp, norm_backward
from moe_bench.spec.model import MixtureOfExperts
from moe_bench.spec.recipe import Recipe

EXPERT_TENSORS = frozenset(
    ("expert_input", "expert_up", "expert_hidden", "members", "bias_rows", "shared_up", "shared_hidden")
)
"""What the products of routed and shared experts keep."""

REDUCED_GRADIENTS = "reduced_gradients"
"""Megatron-FSDP's buffer for the gradients of the experts at work."""


class ExpertHalf:
    """Norm, router, dispatch, routed and shared experts, combine.

    Forward from `mlp_input`, which is alive, to `layer_output`; backward from `grad_layer_output` to
    `grad_mlp_input`.
    """

    place = "experts"

    def __init__(self, recipe: Recipe, moe: MixtureOfExperts, sizes: LayerSizes, *, load: float) -> None:
        self._sizes = sizes
        self._rows = rows = expert_sizes(recipe, moe, sizes, load=load)
        self.dispatched_bytes = rows.received_bytes
        self._recomputes = "moe" in sizes.recomputes
        self._recomputes_norm = sizes.recomputes_norm(is_fused=False)
        is_quack = recipe.kernels.family == "quack"
        self._products = (GatheredProducts if is_quack else GroupedProducts)(recipe, sizes, rows)
        self._is_called_apart = recipe.overlap.expert_parallel
        self._shared = None
        if rows.shared_ffn:
            recomputes = "shared_experts" in sizes.recomputes
            self._shared = Mlp(recipe, sizes, name="shared", ffn=rows.shared_ffn, recomputes=recomputes)
        self._mixes = moe.shared_expert_mixing == "softmax"
        self._shared_input_bytes = 0
        """Of shared experts beside the dispatch, which gather their input themselves and keep it whole:
        a T H (moe/shared_experts.py, pre_forward_comm)."""
        if rows.shared_ffn and recipe.overlap.shared_experts and sizes.is_split:
            self._shared_input_bytes = sizes.gathered_bytes
        self._router_input_bytes = FP32_BYTES * sizes.sharded_tokens * sizes.hidden_size
        self.weights: tuple[Weight, ...] = self._products.weights
        if self._shared is not None:
            self.weights += self._shared.weights

    def forward(self, live: LiveTensors) -> None:
        """From the sum with the attention's output to that with the experts'."""
        live.place = self.place
        live.make("mlp_norm", self._sizes.vector_bytes)
        self._forward(live, is_saved=not self._recomputes)
        if self._recomputes_norm:
            live.free("mlp_norm")
        live.make("layer_output", self._sizes.vector_bytes)
        live.free("experts_output")

    def forward_without_graph(self, live: LiveTensors) -> None:
        """The same, where nothing is saved for a backward pass."""
        live.place = self.place
        live.make("mlp_norm", self._sizes.vector_bytes)
        self._forward(live, is_saved=False)

    def backward(self, live: LiveTensors) -> None:
        """From the gradient of the layer's output to that of the experts' input."""
        sizes, live.place = self._sizes, self.place
        live.made = Made.RECOMPUTE
        if self._recomputes_norm:
            live.make("mlp_norm", sizes.vector_bytes)
        if self._recomputes:
            self._forward(live, is_saved=True)
        live.made = Made.BACKWARD
        self._combine_backward(live)
        self._products.backward(live)
        live.free_if_held(REDUCED_GRADIENTS)  # it waits with those of other layers from here on
        self._dispatch_backward(live)
        self._route_backward(live)
        gradients = ["grad_mlp_norm_router"]
        if self._shared is not None:
            if self._mixes:
                live.make("grad_shared_output", sizes.vector_bytes)
                live.pass_by(sizes.vector_bytes)
                live.free("shared_unweighed")
            self._shared.backward(live)
            live.free_if_held("grad_shared_output", "shared_output", "shared_input")
            gradients.append("grad_mlp_norm_shared")
        norm_backward(live, sizes, *gradients)
        live.free_if_held("experts_output")

    def _forward(self, live: LiveTensors, *, is_saved: bool) -> None:
        """From the norm's output to `experts_output`."""
        sizes = self._sizes
        if self._shared is not None:
            if self._shared_input_bytes:
                live.make("shared_input", self._shared_input_bytes)
            self._shared.forward(live)
            if sizes.has_bias:
                live.pass_by(sizes.vector_bytes)
            if self._mixes:
                live.rename("shared_output", "shared_unweighed")
                live.make("shared_output", sizes.vector_bytes)
            if not is_saved:
                live.free_if_held("shared_input", "shared_up", "shared_hidden", "shared_unweighed")
        self._route(live)
        self._dispatch(live)
        self._products.forward(live, is_saved=is_saved)
        self._combine(live)
        if self._shared is not None:
            live.pass_by(sizes.vector_bytes)
        live.free_if_held("returned_rows", "permuted_rows", "received_rows")
        if not self._is_called_apart:
            live.free_if_held("shared_output")
        if not is_saved:
            live.free("scores", "routing_map", "row_map", "probs")
            live.free_if_held("aux_scores", "logits", "shared_output")
        elif self._rows.permutes != "torch":
            # The dispatcher alone holds them on, once per layer (resident_memory.py).
            live.free("probs")

    def _route(self, live: LiveTensors) -> None:
        """FP32 scores of all experts, again for each loss on them, and which rows go where."""
        rows = self._rows
        live.pass_by(self._router_input_bytes + rows.scores_bytes)
        live.make("routing_map", rows.scores_bytes // FP32_BYTES)
        live.make("scores", rows.scores_bytes)
        live.make("probs", rows.scores_bytes)
        if rows.has_aux_loss and not rows.shares_logits:
            live.make("aux_scores", rows.scores_bytes)
        if rows.has_z_loss and not rows.shares_logits:
            live.make("logits", rows.scores_bytes)
        live.make("row_map", rows.row_map_bytes)

    def _dispatch(self, live: LiveTensors) -> None:
        """Permuted, sent, gathered over ETP, put in order of local experts: `expert_input`.

        Rows that are in order as they arrive, or that the first product gathers, are what it reads and keeps.
        Where nothing is permuted it reads the norm's output.
        """
        rows, last = self._rows, ""
        if rows.permutes == "never":
            return
        if rows.permutes != "after":
            live.make("permuted_rows", rows.sent_bytes)
            last = "permuted_rows"
        if rows.sends_rows:
            live.make("received_rows", rows.received_bytes)
            last = "received_rows"
            if self._is_called_apart:
                live.free_if_held("permuted_rows")
        if rows.gathers_rows:
            live.make("gathered_rows", rows.gathered_bytes)
            last = "gathered_rows"
        if rows.sorts_rows or not last:
            live.make("expert_input", rows.gathered_bytes)
            live.free_if_held("gathered_rows")
        else:
            live.rename(last, "expert_input")

    def _combine(self, live: LiveTensors) -> None:
        """Back in order, sent back, `returned_rows`, and added up to tokens, `experts_output`.

        Products that gather have put their output in the order of arrival, and where nothing was sent have
        added it up.
        """
        rows = self._rows
        if rows.permutes == "never":
            live.rename("expert_output", "experts_output")
            return
        if rows.products_gather:
            live.rename("expert_output", "sorted_output")
        else:
            live.replace("expert_output", "sorted_output", rows.received_bytes)
        if self._is_called_apart:
            live.free_if_held("received_rows")
        live.replace("sorted_output", "returned_rows", 0 if rows.permutes == "after" else rows.sent_bytes)
        live.make("experts_output", self._sizes.vector_bytes)

    def _combine_backward(self, live: LiveTensors) -> None:
        rows = self._rows
        if rows.permutes == "never":
            return
        live.make("grad_returned", rows.sent_bytes)
        live.replace("grad_returned", "grad_sent", rows.received_bytes)
        if rows.products_gather:
            live.rename("grad_sent", "grad_expert_output")
        else:
            live.replace("grad_sent", "grad_expert_output", rows.gathered_bytes)

    def _dispatch_backward(self, live: LiveTensors) -> None:
        rows = self._rows
        if rows.permutes == "never":
            live.rename("grad_expert_input", "grad_tokens")
            live.free("row_map")
            return
        if rows.products_gather:
            live.rename("grad_expert_input", "grad_received")
        else:
            live.replace("grad_expert_input", "grad_received", rows.received_bytes)
        live.replace("grad_received", "grad_permuted", rows.sent_bytes)
        live.make("grad_tokens", self._sizes.vector_bytes)
        live.free("grad_permuted", "row_map")

    def _route_backward(self, live: LiveTensors) -> None:
        sizes = self._sizes
        live.pass_by(3 * self._rows.scores_bytes)
        live.free("scores", "routing_map")
        live.free_if_held("aux_scores", "logits", "probs")
        live.make("grad_router", sizes.vector_bytes)
        live.pass_by(self._router_input_bytes)
        live.make("grad_mlp_norm_router", sizes.vector_bytes)
        live.free("grad_tokens", "grad_router")


class _QuantizedFactors:
    """FP8 copies around one product, with an FP32 scale for each row; nothing in BF16.

    Of tokens, forward R' (in + 4) and for the input's gradient R' (out + 4); of weights, where they are not
    kept over the step (memory.py), E out (in + 4) and E in (out + 4).
    """

    def __init__(self, recipe: Recipe, rows: ExpertSizes, weight: Weight) -> None:
        out_features, in_features = weight
        num_experts = 0 if keeps_experts_row_wise(recipe) else rows.num_local_experts
        is_quantized = multiplies_experts_row_wise(recipe)
        of_inputs, of_outputs = (is_quantized * (width + FP32_BYTES) for width in (in_features, out_features))
        self.forward_bytes = (rows.expert_rows + num_experts * out_features) * of_inputs
        self.backward_bytes = (rows.expert_rows + num_experts * in_features) * of_outputs


class GroupedProducts:
    """The two products of the routed experts and the activation between them, biases and all.

    Of R' rows the input stays, a R' H, its projections, a R' F (1 + gate), and their activation, a R' F,
    unless `moe_act` makes it again; FP8 and FP4 keep both products' inputs at one byte. FP8 with a scale per
    row keeps them as BF16 does, and holds FP8 copies of both factors while it multiplies them
    (harness/kernels/fp8_grouped.py).

    The second bias is weighted and added in FP32, as the probabilities are. Around Transformer Engine's
    products that goes expert by expert and keeps nothing (moe/experts.py, _apply_bias); the torch-native ones
    multiply a one-hot matrix [R', experts] with the biases and keep both (harness/kernels/experts.py).
    """

    def __init__(self, recipe: Recipe, sizes: LayerSizes, rows: ExpertSizes) -> None:
        element, num_inputs = sizes.element_bytes, 1 + recipe.model.activation.is_gated
        self._recomputes_activation = "moe_act" in sizes.recomputes
        self._has_bias = sizes.has_bias
        self._keeps_bias_rows = sizes.has_bias and recipe.kernels.family == "torch_native"
        self._rows_bytes = rows.gathered_bytes
        self._wide_rows_bytes = rows.gathered_bytes * FP32_BYTES // element
        self._saved_rows_bytes = rows.gathered_bytes * rows.gemm_input_element_bytes // element
        self._hidden_bytes = element * rows.expert_rows * rows.ffn
        self._saved_hidden_bytes = rows.gemm_input_element_bytes * rows.expert_rows * rows.ffn
        self._up_bytes = num_inputs * self._hidden_bytes
        self._members_bytes = element * rows.expert_rows * rows.num_local_experts
        hidden, num_experts = recipe.model.expert_hidden_size, rows.num_local_experts
        up, down = (num_inputs * rows.ffn, hidden), (hidden, rows.ffn)
        self.weights: tuple[Weight, ...] = (up, down)
        self._up_factors = _QuantizedFactors(recipe, rows, up)
        self._down_factors = _QuantizedFactors(recipe, rows, down)
        self._up_weight_bytes = sizes.weight_gradient_bytes(up, num_experts)
        self._down_weight_bytes = sizes.weight_gradient_bytes(down, num_experts)
        self._activates_apart = recipe.kernels.family == "transformer_engine"
        num_elements = num_experts * sum(out * into for out, into in self.weights)
        self._reduced_bytes = num_elements * sizes.reduced_gradient_element_bytes

    def forward(self, live: LiveTensors, *, is_saved: bool) -> None:
        """From `expert_input` to `expert_output`."""
        live.make("factors", self._up_factors.forward_bytes)
        live.make("expert_up", self._up_bytes)
        live.free("factors")
        if self._has_bias:
            live.pass_by(self._up_bytes)
        if self._keeps_bias_rows:
            live.make("members", self._members_bytes)
        live.make("expert_hidden", self._hidden_bytes)
        live.make("factors", self._down_factors.forward_bytes)
        live.make("expert_output", self._rows_bytes)
        live.free("factors")
        if self._has_bias:
            self._add_bias(live)
        if self._recomputes_activation or not is_saved:
            live.free("expert_hidden")
        elif self._saved_hidden_bytes != self._hidden_bytes:
            live.free("expert_hidden")
            live.make("expert_hidden", self._saved_hidden_bytes)
        if not is_saved:
            live.free("expert_up", "expert_input")
            live.free_if_held("members", "bias_rows")
        elif self._saved_rows_bytes != self._rows_bytes:
            live.free("expert_input")
            live.make("expert_input", self._saved_rows_bytes)

    def backward(self, live: LiveTensors) -> None:
        """From `grad_expert_output` to `grad_expert_input`.

        Of the second product the weight's gradient comes first, then the activation's; of the first product
        the input's (harness/kernels/grouped_linear.py). Megatron-FSDP takes its buffer when the second
        product is through: ours comes to an end with the activation, Transformer Engine's before it.
        """
        if self._has_bias:
            self._bias_backward(live)
        if self._recomputes_activation:
            live.make("expert_hidden", self._hidden_bytes)
        live.make("grad_down_weight", self._down_weight_bytes)
        if self._recomputes_activation:
            live.free("expert_hidden")
        live.make("factors", self._down_factors.backward_bytes)
        live.make("grad_hidden", self._hidden_bytes)
        live.free("factors")
        if self._activates_apart:
            live.make(REDUCED_GRADIENTS, self._reduced_bytes)
        live.make("grad_up", self._up_bytes)
        live.free("grad_hidden", "grad_expert_output", "expert_up")
        live.free_if_held("expert_hidden")
        if not self._activates_apart:
            live.make(REDUCED_GRADIENTS, self._reduced_bytes)
        live.free("grad_down_weight")
        live.make("factors", self._up_factors.backward_bytes)
        live.make("grad_expert_input", self._rows_bytes)
        live.free("factors")
        live.pass_by(self._up_weight_bytes)
        live.free("grad_up", "expert_input")
        live.free_if_held("members")

    def _add_bias(self, live: LiveTensors) -> None:
        """y + bias p: product and sum in FP32, and back."""
        if self._keeps_bias_rows:
            live.make("bias_rows", self._rows_bytes)
        live.pass_by(2 * self._wide_rows_bytes)
        live.pass_by(self._wide_rows_bytes + self._rows_bytes)

    def _bias_backward(self, live: LiveTensors) -> None:
        live.replace("grad_expert_output", "grad_wide", self._wide_rows_bytes)
        live.make("grad_expert_output", self._rows_bytes)
        live.pass_by(2 * self._wide_rows_bytes + self._rows_bytes)
        live.free("grad_wide")
        live.free_if_held("bias_rows")
