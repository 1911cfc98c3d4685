"""What our own loop reads from a recipe's arguments, with types."""

from __future__ import annotations

from typing import Literal

from moe_bench.harness.mcore_config import MegatronArguments
from moe_bench.spec.base import NonNegativeInt, PositiveFloat, PositiveInt, Spec, Text
from moe_bench.spec.model import RouterChoice
from moe_bench.spec.recipe import KernelFamily, QuantFormat, RoutingMode
from moe_bench.spec.routing_trace import Trace

TritonFusion = Literal["router", "permute", "activation", "gradient_accumulation"]
"""Fusions that Megatron-Core leaves to Transformer Engine, and the other families run on our own kernels."""


class Settings(Spec):
    """The `training` section of the arguments; a key that nobody reads is an error."""

    kernel_family: KernelFamily
    experts_are_fp8: bool
    """Whether the torch-native experts multiply in FP8 with a scale per row, which Megatron-Core knows
    nothing of."""
    triton_fusions: tuple[TritonFusion, ...]
    quantization_format: QuantFormat | None
    """None where nothing is rounded in training."""
    quantizes_experts_only: bool
    num_calibration_batches: NonNegativeInt
    qk_norm: Literal["none", "per_head", "whole_vector", "latent"]
    seq_length: PositiveInt
    micro_batch_size: PositiveInt
    global_batch_size: PositiveInt
    world_size: PositiveInt
    routing_mode: RoutingMode
    routing_trace: Trace
    """Read with `recorded`."""
    router_choice: RouterChoice
    router_has_bias: bool
    """Whether the router has one where linear layers have; Megatron-Core knows no difference."""
    shared_expert_mixing: Literal["sum", "softmax"]
    expert_steps: tuple[tuple[PositiveInt, PositiveInt, PositiveInt], ...]
    """First layer, number and width of experts that are not those of the first expert layers."""
    eval_capacity_factor: PositiveFloat | None
    min_capacity: NonNegativeInt
    num_warmup_steps: PositiveInt
    num_timed_steps: PositiveInt
    seed: NonNegativeInt
    patches: tuple[Text, ...]
    device: Text | None
    """Exact name of the GPU that the recipe is for; None for a machine without one."""

    @property
    def num_steps(self) -> int:
        """Warm-up and timed steps together."""
        return self.num_warmup_steps + self.num_timed_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step over the whole job."""
        return self.global_batch_size * self.seq_length


def settings_of(arguments: MegatronArguments) -> Settings:
    """The section, checked."""
    return Settings.model_validate(arguments.training)
