"""Linear layers of ours as nvidia-modelopt's: Megatron-Core's own are known to it."""

from __future__ import annotations

import torch
from modelopt.torch.quantization.nn import QuantModuleRegistry
from modelopt.torch.quantization.plugins.custom import _ParallelLinear

from moe_bench.harness.kernels.mla import DuplicatedLinear


class QuantDuplicatedLinear(_ParallelLinear):
    """Quantised where the layer multiplies, as in modelopt's plugin for Megatron-Core."""

    _functionals_to_replace = ((torch.nn.functional, "linear"),)


def register_layers() -> None:
    """Tell modelopt of them, once for the process."""
    if DuplicatedLinear not in QuantModuleRegistry:
        QuantModuleRegistry.register({DuplicatedLinear: "moe_bench.DuplicatedLinear"})(QuantDuplicatedLinear)
