"""Queries, keys and values on their way to core attention and their gradients on the way back, by tensor.

Read from Megatron-Core 0.19.2, transformer/attention.py, transformer/multi_latent_attention.py,
models/common/embeddings/rope_utils.py and fusions/fused_mla_yarn_rope_apply.py.
"""

from __future__ import annotations

from moe_bench.analysis.layer_sizes import FP32_BYTES, CoreSizes, LayerSizes, Weight
from moe_bench.analysis.live_tensors import LiveTensors
from moe_bench.spec.mixer import GroupedQueryAttention, MultiLatentAttention
from moe_bench.spec.recipe import Recipe


class GroupedProjections:
    """Queries, keys and values of grouped-query attention in one product, their norms, and the rotation.

    Values stay a view of the product, a T d (n + 2 g) / TP, unless the kernel copies them; queries are copied
    out of it where a rank has several groups (attention.py, get_query_key_value_tensors). An output's gate is
    n d / TP more of the product, and is copied out of it (_apply_output_gate).
    """

    def __init__(
        self, recipe: Recipe, attention: GroupedQueryAttention, sizes: LayerSizes, core: CoreSizes
    ) -> None:
        self._core, self._sizes = core, sizes
        tensor = recipe.parallel.tensor
        heads, groups = attention.num_heads // tensor, attention.num_query_groups // tensor
        self._product_bytes = core.queries_bytes + core.keys_bytes + core.values_bytes
        self._gate_bytes = core.output_bytes if core.is_gated else 0
        self._product_bytes += self._gate_bytes
        self._copies_queries = 1 < groups < heads
        self._has_norm = attention.qk_norm != "none"
        self._is_normed_whole = attention.qk_norm == "whole_vector"
        rows_per_token = 2 if self._is_normed_whole else heads + groups
        self._norm_statistics_bytes = FP32_BYTES * sizes.gathered_tokens * rows_per_token
        self._has_bias = attention.qkv_bias
        # A scaled embedding is rotated operator by operator (rope_utils.py, apply_rotary_pos_emb).
        self._is_fused = recipe.kernels.fusions.rope and recipe.model.rope.scaling is None
        rotated = round(attention.head_dim * recipe.model.rope.rotary_fraction)
        self._angles_bytes = 4 * sizes.positions_bytes * rotated
        self._rotates = rotated > 0
        num_products = heads * (1 + core.is_gated) + 2 * groups
        product = attention.head_dim * num_products, sizes.hidden_size
        self.weights: tuple[Weight, ...] = (product,)
        self._weight_bytes = sizes.weight_gradient_bytes(product)

    def forward(self, live: LiveTensors) -> None:
        """From the norm's output to `queries` and `keys`, with values in `qkv`; all three are in it where
        nothing rotates them.
        """
        core = self._core
        live.make("qkv", self._product_bytes)
        if self._gate_bytes:
            live.make("gate", self._gate_bytes)
        if self._has_bias:
            live.pass_by(self._product_bytes)
        if self._copies_queries:
            live.make("queries_copy", core.queries_bytes)
        if self._is_normed_whole:
            live.make("norm_inputs", core.queries_bytes + core.keys_bytes)
        if self._has_norm:
            live.make("norm_statistics", self._norm_statistics_bytes)
            live.make("queries_normed", core.queries_bytes)
            live.make("keys_normed", core.keys_bytes)
        if not self._rotates:
            if self._has_norm:
                live.rename("queries_normed", "queries")
                live.rename("keys_normed", "keys")
            elif self._copies_queries:
                live.rename("queries_copy", "queries")
            return
        if not self._is_fused:
            live.make("cosines_and_sines", self._angles_bytes)
            live.pass_by(3 * core.queries_bytes)
        live.make("queries", core.queries_bytes)
        live.make("keys", core.keys_bytes)

    def release(self, live: LiveTensors) -> None:
        """After core attention; nothing is recomputed here."""

    def leave(self, live: LiveTensors) -> None:
        """At the end of the module, when local variables go that nobody has saved."""
        live.free_if_held("queries_normed", "keys_normed")
        if not self._has_norm:
            live.free_if_held("queries_copy")
        if self._core.context_ranks > 1:
            live.free_if_held("keys", "values")
        if not self._has_norm and (self._core.context_ranks > 1 or self._core.copies_values):
            live.free("qkv")

    def bring_back(self, live: LiveTensors) -> None:
        """Before the gradients of core attention; nothing is recomputed here."""

    def release_saved(self, live: LiveTensors) -> None:
        """What the core had saved."""
        live.free_if_held("queries", "keys", "values", "cosines_and_sines")
        if not self._has_norm:
            live.free_if_held("qkv")

    def backward(self, live: LiveTensors) -> None:
        """From the gradients of queries, keys and values to `grad_attention_norm`."""
        core = self._core
        live.replace_first(("grad_keys", "grad_keys_shard"), "grad_keys_rotated", core.keys_bytes)
        live.replace("grad_queries", "grad_queries_rotated", core.queries_bytes)
        if self._has_norm:
            live.replace("grad_keys_rotated", "grad_keys_normed", core.keys_bytes)
            live.free("qkv", "norm_statistics")
            live.replace("grad_queries_rotated", "grad_queries_normed", core.queries_bytes)
            live.free_if_held("queries_copy", "norm_inputs")
        live.make("grad_qkv", self._product_bytes)
        live.free_if_held("grad_gate", "grad_keys_rotated", "grad_queries_rotated", "grad_keys_normed")
        live.free_if_held("grad_queries_normed", "grad_values", "grad_values_shard")
        column_backward(live, self._sizes, "grad_qkv", "grad_attention_norm", self._weight_bytes)
        live.free("attention_norm")


class LatentProjections:
    """Latents of queries and of keys and values, their norms, the products behind them, and the rotation.

    Latents stay before and after their norms, a t (2 r_q + 2 r_kv + d_r); the fused rotation writes queries
    in place and keys and values apart. With `mla_up_proj` everything behind the norms is released after core
    attention and made again before its gradients.
    """

    def __init__(
        self, recipe: Recipe, attention: MultiLatentAttention, sizes: LayerSizes, core: CoreSizes
    ) -> None:
        self._core, self._sizes = core, sizes
        heads = attention.num_heads // recipe.parallel.tensor
        query_rank, rank = attention.q_lora_rank or 0, attention.kv_lora_rank
        rope, nope, value = attention.qk_rope_head_dim, attention.qk_nope_head_dim, attention.v_head_dim
        sharded = sizes.element_bytes * sizes.sharded_tokens
        gathered = sizes.element_bytes * sizes.gathered_tokens
        self._has_query_latent = attention.q_lora_rank is not None
        self._recomputes = "mla_up_proj" in sizes.recomputes
        self._is_fused = recipe.kernels.fusions.rope
        self._queries = "query_product" if self._is_fused else "queries"
        self._angles_bytes = 4 * sizes.positions_bytes * rope
        self._query_latent_bytes = sharded * query_rank
        self._latent_bytes = sharded * rank
        self._down_bytes = sharded * (rank + rope)
        self._gathered_query_latent_bytes = gathered * query_rank
        self._gathered_latent_bytes = gathered * rank
        self._product_bytes = gathered * heads * (nope + value)
        hidden = sizes.hidden_size
        query_down, query_up = (query_rank, hidden), (heads * (nope + rope), query_rank or hidden)
        down, up = (rank + rope, hidden), (heads * (nope + value), rank)
        self.weights: tuple[Weight, ...] = (query_down, query_up, down, up)
        self._query_up_bytes = sizes.weight_gradient_bytes(query_up)
        self._up_bytes = sizes.weight_gradient_bytes(up)
        self._query_down_bytes = sizes.weight_gradient_bytes(query_down)

    def forward(self, live: LiveTensors) -> None:
        """From the norm's output to queries, `keys` and `values`."""
        if self._has_query_latent:
            live.make("query_latent", self._query_latent_bytes)
        live.make("latent", self._down_bytes)
        if self._has_query_latent:
            live.make("query_latent_normed", self._query_latent_bytes)
        live.make("latent_normed", self._latent_bytes)
        self._up(live)

    def release(self, live: LiveTensors) -> None:
        """After core attention, what is recomputed."""
        if self._recomputes:
            live.free(self._queries, "keys", "values")
            live.free_if_held("cosines_and_sines")

    def leave(self, live: LiveTensors) -> None:
        """At the end of the module, when local variables go that nobody has saved.

        Padded values stand in for values, and gathered keys and values for this rank's.
        """
        if not self._recomputes and self._core.context_ranks > 1:
            live.free("keys", "values")
        elif not self._recomputes and self._core.pads_values:
            live.free("values")

    def bring_back(self, live: LiveTensors) -> None:
        """Before the gradients of core attention, what is recomputed."""
        if self._recomputes:
            self._up(live)

    def release_saved(self, live: LiveTensors) -> None:
        """What the core had saved."""
        live.free(self._queries)
        live.free_if_held("keys", "values", "cosines_and_sines")

    def backward(self, live: LiveTensors) -> None:
        """From the gradients of queries, keys and values to `grad_attention_norm`."""
        sizes = self._sizes
        live.make("grad_product", self._product_bytes)
        live.free_if_held(
            "grad_values", "grad_values_cut", "grad_values_shard", "grad_keys", "grad_keys_shard"
        )
        self._up_backward(live, "grad_product", "latent_normed", self._up_bytes)
        if self._has_query_latent:
            self._up_backward(live, "grad_queries", "query_latent_normed", self._query_up_bytes)
        live.replace("grad_latent_normed", "grad_latent", self._down_bytes)
        live.free("latent")
        if self._has_query_latent:
            live.replace("grad_query_latent_normed", "grad_query_latent", self._query_latent_bytes)
            live.free("query_latent")
        live.make("grad_norm_of_latent", sizes.vector_bytes)
        live.free("grad_latent")
        if self._has_query_latent:
            live.make("grad_norm_of_query", sizes.vector_bytes)
            live.pass_by(self._query_down_bytes)
            live.free("grad_query_latent")
        else:
            column_backward(live, sizes, "grad_queries", "grad_norm_of_query", self._query_up_bytes)
        live.free("attention_norm")
        live.make("grad_attention_norm", sizes.vector_bytes)
        live.free("grad_norm_of_latent", "grad_norm_of_query")

    def _up(self, live: LiveTensors) -> None:
        core = self._core
        live.make("query_product", core.queries_bytes)
        live.make("product", self._product_bytes)
        if not self._is_fused:
            live.make("cosines_and_sines", self._angles_bytes)
            live.make("queries", core.queries_bytes)
        live.make("keys", core.keys_bytes)
        live.make("values", core.values_bytes)
        live.free("product")
        if not self._is_fused:
            live.free("query_product")

    def _up_backward(self, live: LiveTensors, output: str, saved: str, weight_bytes: int) -> None:
        """The two gradients of a product behind a latent, which is gathered over tensor-parallel ranks."""
        is_query = saved.startswith("query")
        gathered = self._gathered_query_latent_bytes if is_query else self._gathered_latent_bytes
        live.make(f"grad_{saved}_gathered", gathered)
        live.pass_by(weight_bytes)
        live.free(output, saved)
        sharded = self._query_latent_bytes if is_query else self._latent_bytes
        live.replace(f"grad_{saved}_gathered", f"grad_{saved}", sharded)


def column_backward(
    live: LiveTensors, sizes: LayerSizes, output: str, gradient: str, weight_bytes: int
) -> None:
    """The two gradients of a product split by columns (tensor_parallel/layers.py,
    LinearWithGradAccumulationAndAsyncCommunication): of its input, reduce-scattered under sequence
    parallelism, and of its weight.
    """
    if sizes.is_split:
        live.make("grad_gathered", sizes.gathered_bytes)
    live.make(gradient, sizes.vector_bytes)
    live.pass_by(weight_bytes)
    live.free_if_held("grad_gathered")
    live.free(output)
