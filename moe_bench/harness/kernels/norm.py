"""Normalisations for Megatron-Core from torch alone, right under sequence and tensor parallelism."""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.nn import functional

from moe_bench.errors import MissingRequirementError


class RMSNorm(torch.nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv:1910.07467)."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(torch.ones, config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size]; torch computes in FP32 inside."""
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


class LayerNorm(torch.nn.Module):
    """(x - mean(x)) / sqrt(var(x) + eps) * weight + bias over the last dimension (arXiv:1607.06450)."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(torch.ones, config, hidden_size)
        self.bias = _parameter(torch.zeros, config, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., hidden_size]; torch computes in FP32 inside."""
        return functional.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


def norm(*, config: TransformerConfig, hidden_size: int, eps: float) -> RMSNorm | LayerNorm:
    """Build the normalisation that the configuration names; it stands in every norm slot of a layer spec."""
    if config.layernorm_zero_centered_gamma:
        raise MissingRequirementError(
            "layernorm_zero_centered_gamma: the torch-native norms do not have it; "
            "use the transformer_engine kernels"
        )
    if config.normalization == "RMSNorm":
        return RMSNorm(config=config, hidden_size=hidden_size, eps=eps)
    if config.normalization == "LayerNorm":
        return LayerNorm(config=config, hidden_size=hidden_size, eps=eps)
    raise MissingRequirementError(
        f"normalization {config.normalization}: the torch-native norms are RMSNorm and LayerNorm; "
        "choose one of the two"
    )


class WholeVectorRMSNorm(torch.nn.Module):
    """RMSNorm of queries or keys over all heads at once, as OLMoE has it (arXiv:2409.02060).

    Megatron-Core normalises each head by itself and builds the norm with one head's width; `num_heads`, bound
    when the layer spec is made, is what it does not pass. Under tensor parallelism each rank sees its own
    heads, so the sum of squares is all-reduced, and so is its gradient. The weight is whole on every rank,
    not split: Megatron-Core sums the gradients of all parameters named `q_layernorm` or `k_layernorm` over
    the tensor-parallel group (distributed/finalize_model_grads.py,
    _allreduce_non_tensor_model_parallel_grads), which puts together the slices that the ranks contribute.
    """

    def __init__(
        self,
        *,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        num_heads: int,
        tp_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.tp_group = tp_group or ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]).tp
        if num_heads % self.tp_group.size() != 0:
            raise MissingRequirementError(
                f"a norm over all {num_heads} heads at once needs a tensor-parallel size that divides them, "
                f"not {self.tp_group.size()}"
            )
        self.weight = _parameter(torch.ones, config, num_heads * hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [s, b, heads of this rank, head_dim] over head_dim and the heads of all ranks."""
        tp_size = self.tp_group.size()
        weight = self.weight.chunk(tp_size)[self.tp_group.rank()]
        vector = x.flatten(-2)
        if tp_size == 1:
            return functional.rms_norm(vector, weight.shape, weight, self.eps).view_as(x)
        wide = vector.to(torch.promote_types(vector.dtype, torch.float32))
        sum_of_squares = wide.square().sum(dim=-1, keepdim=True)
        # The first all-reduces forward, the second backward: every rank's output depends on every head.
        sum_of_squares = reduce_from_tensor_model_parallel_region(sum_of_squares, group=self.tp_group)
        sum_of_squares = copy_to_tensor_model_parallel_region(sum_of_squares, group=self.tp_group)
        inverse_rms = torch.rsqrt(sum_of_squares / self.weight.numel() + self.eps)
        return (wide * inverse_rms * weight).to(x.dtype).view_as(x)


def _parameter(
    fill: Callable[..., Tensor],
    config: TransformerConfig,
    size: int,
) -> torch.nn.Parameter:
    """A vector of the model's type, marked for the gradient sum over the ranks that split the sequence."""
    device = None if config.use_cpu_initialization else torch.cuda.current_device()
    parameter = torch.nn.Parameter(fill(size, dtype=config.params_dtype, device=device))
    parameter.sequence_parallel = config.sequence_parallel
    return parameter
