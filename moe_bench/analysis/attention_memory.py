"""What the attention half of a layer holds while it runs forward and backward, tensor by tensor.

Read from Megatron-Core 0.19.2, transformer/attention.py, transformer/transformer_layer.py and
tensor_parallel/layers.py, in the order of their operators; a tensor lives until nobody needs it any more.
"""

from __future__ import annotations

from moe_bench.analysis.layer_sizes import CoreSizes, LayerSizes, Weight, core_sizes
from moe_bench.analysis.live_tensors import LiveTensors, Made
from moe_bench.analysis.projection_memory import GroupedProjections, LatentProjections
from moe_bench.spec.recipe import Recipe


class AttentionHalf:
    """Norm, projections and core attention.

    Forward from `layer_input`, which is alive, to `mlp_input`; backward from `grad_mlp_input` to
    `grad_layer_input`.
    """

    place = "attention"

    def __init__(self, recipe: Recipe, sizes: LayerSizes) -> None:
        self._sizes = sizes
        self._core = core = core_sizes(recipe, sizes)
        self._recomputes_norm = sizes.recomputes_norm(is_fused=not sizes.norms_are_separate)
        attention = recipe.model.attention
        self._inputs: GroupedProjections | LatentProjections = (
            LatentProjections(recipe, attention, sizes, core)
            if attention.kind == "mla"
            else GroupedProjections(recipe, attention, sizes, core)
        )
        self._kernel = CoreKernel(core, self._inputs, recomputes="core_attn" in sizes.recomputes)
        width = core.output_bytes // (sizes.element_bytes * sizes.gathered_tokens)
        projection = sizes.hidden_size, width
        self.weights: tuple[Weight, ...] = (*self._inputs.weights, projection)
        self._projection_bytes = sizes.weight_gradient_bytes(projection)

    def forward(self, live: LiveTensors) -> None:
        """From the layer's input to its sum with the attention's output."""
        sizes, live.place = self._sizes, self.place
        live.make("attention_norm", sizes.vector_bytes)
        self._inputs.forward(live)
        self._kernel.forward(live)
        if self._core.copies_output:
            live.make("output_copy", self._core.output_bytes)
        live.make("projected_whole", sizes.gathered_bytes)
        live.free_if_held("output_copy")
        sizes.scatter(live, "projected_whole", "projected")
        self._inputs.leave(live)
        if self._recomputes_norm:
            live.free("attention_norm")
        live.make("mlp_input", sizes.vector_bytes)
        live.free("projected")

    def backward(self, live: LiveTensors) -> None:
        """From the gradient of the sum to that of the layer's input."""
        sizes, live.place = self._sizes, self.place
        if self._recomputes_norm:
            live.made = Made.RECOMPUTE
            live.make("attention_norm", sizes.vector_bytes)
        live.made = Made.BACKWARD
        if sizes.is_split:
            live.make("grad_projected", sizes.gathered_bytes)
        live.make("grad_output", self._core.output_bytes)
        live.pass_by(self._projection_bytes)
        live.free_if_held("grad_projected", "output_for_projection")
        self._kernel.backward(live)
        self._inputs.backward(live)
        live.make("grad_attention_input", sizes.vector_bytes)
        live.free("grad_attention_norm", "layer_input")
        live.make("grad_layer_input", sizes.vector_bytes)
        live.free("grad_attention_input", "grad_mlp_input")


class CoreKernel:
    """Fused attention: keeps its inputs, its output and the log-sum-exp (harness/dryrun/stand_ins.py)."""

    def __init__(
        self, core: CoreSizes, inputs: GroupedProjections | LatentProjections, *, recomputes: bool
    ) -> None:
        self._core, self._inputs, self._recomputes = core, inputs, recomputes

    def forward(self, live: LiveTensors) -> None:
        """From queries, keys and values to `output`, or `output_for_projection` where that is another one."""
        core = self._core
        if core.copies_values:
            live.make("values", core.values_bytes)
        if core.context_ranks > 1:
            live.make("keys_of_all", core.keys_bytes * core.context_ranks)
            live.make("values_copy", core.values_bytes)
            live.make("values_of_all", core.values_bytes * core.context_ranks)
            live.free("values_copy")
        self._run(live)
        if core.has_sink or core.pads_values or core.is_gated:
            live.make("output_for_projection", core.output_bytes)
        self._inputs.release(live)
        if self._recomputes:
            live.free("statistics")
            live.free_if_held("values_padded", "output_padded")

    def backward(self, live: LiveTensors) -> None:
        """From `grad_output` to `grad_queries`, `grad_keys` and `grad_values`."""
        core = self._core
        if core.is_gated:
            live.make("grad_gate", core.output_bytes)
            live.free("gate")
        live.made = Made.RECOMPUTE
        self._inputs.bring_back(live)
        if self._recomputes:
            self._run(live)
        live.made = Made.BACKWARD
        values_bytes = core.keys_bytes if core.pads_values else core.values_bytes
        if core.pads_values or core.has_sink or core.is_gated:
            live.replace("grad_output", "grad_kernel_output", self._kernel_output_bytes)
        live.make("grad_queries", core.queries_bytes)
        if core.expands_keys:
            live.make("grad_keys_per_head", core.queries_bytes * core.context_ranks)
            live.make("grad_values_per_head", core.queries_bytes * core.context_ranks)
        live.make("grad_keys", core.keys_bytes * core.context_ranks)
        live.make("grad_values", values_bytes * core.context_ranks)
        live.free_if_held("grad_keys_per_head", "grad_values_per_head")
        live.free("statistics")
        live.free_if_held(
            "grad_output",
            "grad_kernel_output",
            "output",
            "output_padded",
            "values_padded",
            "keys_of_all",
            "values_of_all",
        )
        self._inputs.release_saved(live)
        if core.context_ranks > 1:
            self._scatter(live, "grad_keys", core.keys_bytes)
            self._scatter(live, "grad_values", core.values_bytes)
        if core.pads_values:
            live.replace("grad_values", "grad_values_cut", core.values_bytes)

    @property
    def _kernel_output_bytes(self) -> int:
        return self._core.queries_bytes if self._core.pads_values else self._core.output_bytes

    def _run(self, live: LiveTensors) -> None:
        core = self._core
        if core.pads_values:
            live.make("values_padded", core.keys_bytes)
            live.make("output_padded", core.queries_bytes)
        elif not live.holds("output"):
            live.make("output", core.output_bytes)
        live.make("statistics", core.statistics_bytes)

    def _scatter(self, live: LiveTensors, name: str, num_bytes: int) -> None:
        """Gradients of gathered keys or values are reduce-scattered over the context-parallel ranks."""
        live.replace(name, f"{name}_shard", num_bytes)
