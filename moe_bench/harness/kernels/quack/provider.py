"""The modules of the kernel family `quack`: experts that gather their rows; the rest is torch-native."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.provider import TorchNativeSpecProvider
from moe_bench.harness.kernels.quack.experts import QuackExperts
from moe_bench.harness.kernels.quack.moe_layer import GatheringMoELayer


class QuackSpecProvider(TorchNativeSpecProvider):
    """Experts on quack-kernels, and the MoE layer that hands them rows which nobody permuted."""

    def moe_layer(self) -> Callable[..., torch.nn.Module]:
        """The layer whose all-to-all dispatcher leaves rows where they are."""
        return GatheringMoELayer

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Callable[..., torch.nn.Module]:
        """All local experts in products over rows of varying number.

        Raises MissingRequirementError for experts one by one, or with a weight each.
        """
        if not moe_use_grouped_gemm:
            raise MissingRequirementError(
                "kernels.grouped_gemm: false: quack has no experts one by one; write true, or torch_native"
            )
        if self.choice.experts_are_apart:
            raise MissingRequirementError(
                "parallel.data_sharding: megatron_fsdp gives each expert a weight of its own and quack's "
                "experts share one; use distributed_optimizer, or torch_native"
            )
        return partial(QuackExperts, accumulates="gradient_accumulation" in self.choice.fusions)
