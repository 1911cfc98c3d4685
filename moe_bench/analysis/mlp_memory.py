"""What a dense MLP, alone or as shared experts, holds while it runs forward and backward, tensor by tensor.

Read from Megatron-Core 0.19.2, transformer/mlp.py, transformer/transformer_layer.py and
fusions/fused_bias_swiglu.py, in the order of their operators.
"""

from __future__ import annotations

from moe_bench.analysis.layer_sizes import LayerSizes, Weight
from moe_bench.analysis.live_tensors import LiveTensors, Made
from moe_bench.analysis.projection_memory import column_backward
from moe_bench.spec.recipe import Recipe


class Mlp:
    """Two products around an activation of F channels per rank, gated or not.

    What goes into the activation, a T F (1 + gate), and what comes out of it, a T F, stay.
    """

    def __init__(self, recipe: Recipe, sizes: LayerSizes, *, name: str, ffn: int, recomputes: bool) -> None:
        self._sizes, self._name, self._recomputes = sizes, name, recomputes
        self._hidden_bytes = sizes.element_bytes * sizes.gathered_tokens * ffn
        num_inputs = 1 + recipe.model.activation.is_gated
        self._up_bytes = num_inputs * self._hidden_bytes
        up, down = (num_inputs * ffn, sizes.hidden_size), (sizes.hidden_size, ffn)
        self.weights: tuple[Weight, ...] = (up, down)
        self._up_weight_bytes = sizes.weight_gradient_bytes(up)
        self._down_weight_bytes = sizes.weight_gradient_bytes(down)
        self._up, self._hidden, self._output = f"{name}_up", f"{name}_hidden", f"{name}_output"

    def forward(self, live: LiveTensors) -> None:
        """From the norm's output, which stays, to `<name>_output`."""
        self._products(live)
        self._sizes.scatter(live, f"{self._output}_whole", self._output)
        if self._recomputes:
            live.free(self._up, self._hidden)

    def backward(self, live: LiveTensors) -> None:
        """From the gradient of the output, which stays, to `grad_mlp_norm_<name>`.

        A recomputed output stays until the backward pass is through (CheckpointFunction.backward).
        """
        sizes = self._sizes
        if self._recomputes:
            live.made = Made.RECOMPUTE
            self._products(live)
            sizes.scatter(live, f"{self._output}_whole", f"{self._output}_again")
        live.made = Made.BACKWARD
        if sizes.is_split:
            live.make("grad_output_whole", sizes.gathered_bytes)
        live.make("grad_hidden", self._hidden_bytes)
        live.pass_by(self._down_weight_bytes)
        live.free_if_held("grad_output_whole")
        live.free(self._hidden)
        live.make("grad_up", self._up_bytes)
        live.free("grad_hidden", self._up)
        column_backward(live, sizes, "grad_up", f"grad_mlp_norm_{self._name}", self._up_weight_bytes)
        live.free_if_held(f"{self._output}_again")

    def _products(self, live: LiveTensors) -> None:
        """A product and its sum with a bias live side by side; the second bias is the caller's to add."""
        live.make(self._up, self._up_bytes)
        if self._sizes.has_bias:
            live.pass_by(self._up_bytes)
        live.make(self._hidden, self._hidden_bytes)
        live.make(f"{self._output}_whole", self._sizes.gathered_bytes)


class DenseHalf:
    """Norm and dense MLP.

    Forward from `mlp_input`, which is alive, to `layer_output`; backward from `grad_layer_output` to
    `grad_mlp_input`.
    """

    place = "dense MLP"
    dispatched_bytes = 0

    def __init__(self, recipe: Recipe, sizes: LayerSizes) -> None:
        self._sizes = sizes
        self._recomputes_norm = sizes.recomputes_norm(is_fused=not sizes.norms_are_separate)
        ffn = (recipe.model.dense_ffn_hidden_size or 0) // recipe.parallel.tensor
        self._mlp = Mlp(recipe, sizes, name="mlp", ffn=ffn, recomputes="mlp" in sizes.recomputes)
        self.weights = self._mlp.weights

    def forward(self, live: LiveTensors) -> None:
        """From the sum with the attention's output to that with the MLP's."""
        live.place = self.place
        live.make("mlp_norm", self._sizes.vector_bytes)
        self._mlp.forward(live)
        if self._recomputes_norm:
            live.free("mlp_norm")
        live.make("layer_output", self._sizes.vector_bytes)
        live.free("mlp_output")

    def forward_without_graph(self, live: LiveTensors) -> None:
        """The same, where nothing is saved for a backward pass."""
        self.forward(live)

    def backward(self, live: LiveTensors) -> None:
        """From the gradient of the layer's output to that of the MLP's input."""
        live.place = self.place
        if self._recomputes_norm:
            live.made = Made.RECOMPUTE
            live.make("mlp_norm", self._sizes.vector_bytes)
        self._mlp.backward(live)
        norm_backward(live, self._sizes, "grad_mlp_norm_mlp")


def norm_backward(live: LiveTensors, sizes: LayerSizes, *gradients: str) -> None:
    """From the gradients of a norm's output, added up, to that of its input, with the residual's added."""
    if len(gradients) > 1:
        live.make("grad_mlp_norm", sizes.vector_bytes)
        live.free(*gradients)
        gradients = ("grad_mlp_norm",)
    live.make("grad_norm_input", sizes.vector_bytes)
    live.free("mlp_norm", "mlp_input", *gradients)
    live.make("grad_mlp_input", sizes.vector_bytes)
    live.free("grad_norm_input", "grad_layer_output")
