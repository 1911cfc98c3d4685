"""An MoE layer of Megatron-Core whose router and permutation are our Triton kernels, as a recipe asks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer

from moe_bench.harness.kernels.fused.dispatchers import fuse_permutation
from moe_bench.harness.kernels.fused.router import fuse_router


def fused_moe_layer(
    kind: Callable[..., MoELayer], *, fuses_router: bool, fuses_permutation: bool, **options: Any
) -> MoELayer:
    """Build the layer, then change its router and its dispatcher, for which its spec has no place.

    Raises:
        MissingRequirementError: the kernels do not know the router or the dispatcher.
    """
    layer = kind(**options)
    if fuses_router:
        fuse_router(layer.router)
    if fuses_permutation:
        fuse_permutation(layer.token_dispatcher)
    return layer
