"""What stays on the GPU of a layer's kept tensors, which low precision shrinks and offload takes.

transformer_engine 2.20.2, module/linear.py, module/layernorm_linear.py and cpu_offload.py; Megatron-Core
0.19.2, pipeline_parallel/fine_grained_activation_offload.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from moe_bench.analysis.hybrid_memory import kept_by_structures
from moe_bench.spec.recipe import OffloadModule, Precision, Recipe

_ELEMENT_BYTES: Mapping[Precision, float] = {
    "fp8_delayed": 1.0,
    "fp8_tensorwise": 1.0,
    "fp8_blockwise": 1 + 4 / 128,
    "mxfp8": 1 + 1 / 32,
    "nvfp4": 1 / 2 + 1 / 16,
}
"""Bytes of one element of a product's input as it is kept for the weight gradient, scales included: the
column-wise copy alone (update_usage(rowwise_usage=False, columnwise_usage=True))."""

_INPUTS_OF_PRODUCTS = ("attention_norm", "mlp_norm", "mlp_hidden", "shared_hidden")
"""Tensors that nothing but a quantized product reads again."""

OFFLOADED: Mapping[OffloadModule, tuple[str, ...]] = {
    "attn_norm": ("layer_input",),
    "qkv_linear": ("attention_norm",),
    "core_attn": ("queries", "keys", "values"),
    "attn_proj": ("output", "output_for_projection"),
    "mlp_norm": ("mlp_input",),
    "expert_fc1": ("expert_input",),
    "moe_act": ("expert_up",),
    "fused_group_mlp": ("expert_input", "expert_up", "expert_hidden"),
}
"""Kept tensors that a module of `offload.modules` sends to the host: what it had saved."""


def kept_on_device(recipe: Recipe, kept: Mapping[str, int], *, is_moe: bool) -> dict[str, int]:
    """`kept` of a layer that is not recomputed, in bytes by tensor, as far as the GPU holds it.

    In a hybrid model that is the mean over its layers with experts, or those without (hybrid_memory.py).

    With experts the norm in front of the MLP is read by the router in high precision and stays as it is. The
    attention's output is kept twice in low precision, for core attention and for the product behind it.
    A layer at work has everything: what was offloaded comes back before its backward pass.
    """
    held = _quantized(recipe, kept_by_structures(recipe, kept, is_moe=is_moe), is_moe=is_moe)
    for module in recipe.offload.modules:
        for name in OFFLOADED[module]:
            held.pop(name, None)
    return held


def _quantized(recipe: Recipe, kept: Mapping[str, int], *, is_moe: bool) -> dict[str, int]:
    held = dict(kept)
    element = _ELEMENT_BYTES.get(recipe.precision)
    if element is None or recipe.kernels.family != "transformer_engine":
        return held
    for name in _INPUTS_OF_PRODUCTS:
        if name in held and not (is_moe and name == "mlp_norm"):
            held[name] = round(held[name] * element / 2)
    if "output" in held and "output_for_projection" not in held:
        held["output_for_projection"] = round(held["output"] * element / 2)
    return held
