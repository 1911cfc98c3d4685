"""Which modules stand in a Megatron-Core layer spec, for each kernel family."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Literal

import torch
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness.kernels.attention import CoreAttention
from moe_bench.harness.kernels.experts import UNFUSED, ExpertFusions, GroupedExperts
from moe_bench.harness.kernels.grouped_linear import PLAIN, Products
from moe_bench.harness.kernels.mla import DuplicatedLinear
from moe_bench.harness.kernels.norm import norm
from moe_bench.harness.kernels.shared_experts import MixingMoELayer
from moe_bench.harness.settings import TritonFusion

TRANSFORMER_ENGINE_PIP = 'pip install --no-build-isolation "transformer_engine[pytorch]"'


ExpertStep = tuple[int, int, int]
"""First decoder layer, counted from 0, number of experts, and their width."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """Whose kernels a model is built from, and what Megatron-Core's configuration cannot say about them."""

    family: str
    """`torch_native`, `transformer_engine` or `quack` (a recipe's `kernels.family`)."""
    device_type: str
    """`cuda` or `cpu`: where the model is to run; decides the attention kernel of the torch-native family."""
    qk_norm: Literal["none", "per_head", "whole_vector"] = "none"
    """Norm on queries and keys of grouped-query attention."""
    experts_are_apart: bool = False
    """Whether torch-native experts have a weight each (`ExpertStack`, for Megatron-FSDP)."""
    experts_are_fp8: bool = False
    """Whether the torch-native experts multiply in FP8 (precision `fp8_rowwise`)."""
    fusions: frozenset[TritonFusion] = frozenset()
    """What the other families than Transformer Engine run as Triton kernels."""
    expert_steps: tuple[ExpertStep, ...] = ()
    """Where experts change on the way up, in order."""
    mixes_shared_experts: bool = False
    """Whether shared experts are weighed against the routed ones (`MixingMoELayer`), not added to them."""


class TorchNativeSpecProvider(BackendSpecProvider):
    """Modules made of torch alone: fused attention and grouped GEMM on a GPU, plain arithmetic on a CPU."""

    def __init__(self, choice: KernelChoice) -> None:
        self.choice = choice

    def linear(self) -> type[torch.nn.Module]:
        """A linear layer that is whole on every tensor-parallel rank."""
        return DuplicatedLinear

    def column_parallel_linear(self) -> type[torch.nn.Module]:
        """Megatron-Core's own: a torch GEMM."""
        return ColumnParallelLinear

    def row_parallel_linear(self) -> type[torch.nn.Module]:
        """Megatron-Core's own: a torch GEMM."""
        return RowParallelLinear

    def fuse_layernorm_and_linear(self) -> bool:
        """No module joins the two."""
        return False

    def column_parallel_layer_norm_linear(self) -> None:
        """No module joins the two."""

    def layer_norm(
        self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False
    ) -> Callable[..., torch.nn.Module]:
        """Return the builder of the norm that the model's configuration names."""
        del rms_norm, for_qk, has_residual
        return norm

    def core_attention(self) -> ModuleSpec:
        """Attention between the projections; its kernel is chosen by `attention_implementation`."""
        return ModuleSpec(module=CoreAttention, params={"device_type": self.choice.device_type})

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> Callable[..., torch.nn.Module]:
        """All local experts in grouped GEMMs, or one after the other."""
        if moe_use_grouped_gemm:
            return partial(
                GroupedExperts,
                are_apart=self.choice.experts_are_apart,
                products=self._products(),
                fusions=self._expert_fusions(),
            )
        submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
        return partial(_sequential_experts, submodules=submodules)

    def _products(self) -> Products:
        """FP8 is loaded where it is asked for: it needs Triton, which not every torch comes with."""
        if not self.choice.experts_are_fp8:
            return PLAIN
        if self.choice.device_type != "cuda":
            raise MissingRequirementError(
                "precision: fp8_rowwise needs a Hopper GPU; torch's scaled_grouped_mm has no code for a CPU"
            )
        if find_spec("triton") is None:
            raise MissingRequirementError("precision: fp8_rowwise needs the package triton, not installed")
        from moe_bench.harness.kernels.fp8_grouped import RowwiseFp8Products

        return RowwiseFp8Products()

    def _expert_fusions(self) -> ExpertFusions:
        """Loaded where they are asked for, as `_products`."""
        if not self.choice.fusions & {"activation", "gradient_accumulation"}:
            return UNFUSED
        from moe_bench.harness.kernels.fused.activation import TritonGatedActivation
        from moe_bench.harness.kernels.fused.weight_gradient import accumulate_weight_gradient

        return ExpertFusions(
            activation=TritonGatedActivation.of if "activation" in self.choice.fusions else None,
            accumulate=accumulate_weight_gradient if "gradient_accumulation" in self.choice.fusions else None,
        )

    def activation_func(self) -> None:
        """Megatron-Core's own activation."""

    def moe_layer(self) -> Callable[..., torch.nn.Module]:
        """Megatron-Core's own, or the one that weighs shared experts."""
        return MixingMoELayer if self.choice.mixes_shared_experts else MoELayer

    def fused_moe_layer(self) -> Callable[..., torch.nn.Module]:
        """`moe_layer` with the router and the permutation that are asked for."""
        if not self.choice.fusions & {"router", "permute"}:
            return self.moe_layer()
        from moe_bench.harness.kernels.fused.moe_layer import fused_moe_layer

        return partial(
            fused_moe_layer,
            self.moe_layer(),
            fuses_router="router" in self.choice.fusions,
            fuses_permutation="permute" in self.choice.fusions,
        )


def provider_for(choice: KernelChoice) -> BackendSpecProvider:
    """Return the modules of a kernel family.

    Raises BadInputError where there is no such family, MissingRequirementError where it is not installed,
    does not run on the device, or has not what is asked of its experts.
    """
    family, device_type = choice.family, choice.device_type
    if choice.experts_are_fp8 and family != "torch_native":
        raise MissingRequirementError(
            f"precision: fp8_rowwise needs kernels.family: torch_native, not {family}"
        )
    if choice.mixes_shared_experts and family != "torch_native":
        raise MissingRequirementError(
            "model.moe.shared_expert_mixing: softmax is built from the torch_native kernels"
        )
    _require_triton(choice.fusions, device_type)
    if family == "torch_native":
        return TorchNativeSpecProvider(choice)
    if family == "transformer_engine":
        if find_spec("transformer_engine") is None:
            raise MissingRequirementError(
                f"kernels.family: transformer_engine is not installed; {TRANSFORMER_ENGINE_PIP}, "
                "or use torch_native"
            )
        from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider

        return TESpecProvider()
    if family == "quack":
        from moe_bench.harness.kernels.quack.experts import require_quack
        from moe_bench.harness.kernels.quack.provider import QuackSpecProvider

        require_quack(device_type)
        return QuackSpecProvider(choice)
    raise BadInputError(f"kernels.family: {family}; one of torch_native, transformer_engine, quack")


def _require_triton(fusions: frozenset[TritonFusion], device_type: str) -> None:
    """Raise MissingRequirementError where the kernels that are asked for cannot run."""
    if not fusions:
        return
    names = ", ".join(f"kernels.fusions.{name}" for name in sorted(fusions))
    if device_type != "cuda":
        raise MissingRequirementError(f"{names}: a Triton kernel, which needs a GPU; set it to false")
    if find_spec("triton") is None:
        raise MissingRequirementError(f"{names}: needs the package triton, not installed")


def _sequential_experts(
    num_local_experts: int,
    config: TransformerConfig,
    *,
    submodules: MLPSubmodules,
    pg_collection: ProcessGroupCollection | None = None,
    name: str | None = None,
) -> SequentialMLP:
    """Megatron-Core's loop over experts, refused where its bias is added in place to a view (mlp.py:354)."""
    if config.add_bias_linear:
        raise MissingRequirementError(
            "kernels.grouped_gemm: false does not work for experts with biases (Megatron-Core, mlp.py:354, "
            "writes into a view that autograd protects); set it to true"
        )
    return SequentialMLP(
        num_local_experts, config, submodules=submodules, pg_collection=pg_collection, name=name
    )
