"""What experts hold whose products gather rows and make the activation again (harness/kernels/quack)."""

from __future__ import annotations

from moe_bench.analysis.layer_sizes import ExpertSizes, LayerSizes, Weight
from moe_bench.analysis.live_tensors import LiveTensors
from moe_bench.spec.recipe import Recipe


class GatheredProducts:
    """The two products of the routed experts, the activation in their epilogues, and the sum over rows.

    Of R' rows stays what is before the activation, a R' F (1 + gate), and of the t tokens that rows are
    gathered from one copy; it is the layer's own input where nothing is sent, and counted there.
    """

    def __init__(self, recipe: Recipe, sizes: LayerSizes, rows: ExpertSizes) -> None:
        num_inputs = 1 + recipe.model.activation.is_gated
        self._rows_bytes = rows.gathered_bytes
        self._tokens_bytes = sizes.vector_bytes if rows.permutes == "never" else rows.gathered_bytes
        self._gathers = rows.products_gather
        self._hidden_bytes = sizes.element_bytes * rows.expert_rows * rows.ffn
        self._up_bytes = num_inputs * self._hidden_bytes
        hidden, num_experts = recipe.model.expert_hidden_size, rows.num_local_experts
        up, down = (num_inputs * rows.ffn, hidden), (hidden, rows.ffn)
        self.weights: tuple[Weight, ...] = (up, down)
        self._up_weight_bytes = sizes.weight_gradient_bytes(up, num_experts)
        self._down_weight_bytes = sizes.weight_gradient_bytes(down, num_experts)

    def forward(self, live: LiveTensors, *, is_saved: bool) -> None:
        """To `expert_output`, each token's rows added up."""
        live.make("expert_up", self._up_bytes)
        live.make("expert_hidden", self._hidden_bytes)
        live.make("expert_rows", self._rows_bytes)
        live.make("expert_output", self._tokens_bytes)
        live.free("expert_rows", "expert_hidden")
        if not is_saved:
            live.free("expert_up")
            live.free_if_held("expert_input")

    def backward(self, live: LiveTensors) -> None:
        """From the gradient of `expert_output` to `grad_expert_input`, that of the tokens."""
        live.make("grad_up", self._up_bytes)
        live.make("expert_hidden", self._hidden_bytes)
        live.make("grad_down_weight", self._down_weight_bytes)
        live.free("expert_up", "expert_hidden", "grad_down_weight")
        live.free_if_held("grad_expert_output")
        live.make("grad_rows", self._rows_bytes)
        if self._gathers:
            live.replace("grad_rows", "grad_expert_input", self._tokens_bytes)
        else:
            live.rename("grad_rows", "grad_expert_input")
        live.pass_by(self._up_weight_bytes)
        live.free("grad_up")
        live.free_if_held("expert_input")
