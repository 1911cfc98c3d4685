"""Tokens that one rank works on and bytes of their elements, which every closed form starts from."""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Tokens of one micro batch that one rank works on."""

    gathered: int
    """T = S b / CP, inside attention and MLPs."""
    sharded: int
    """t = T / TP with sequence parallelism, else T: around norms, residuals and routing."""


def token_counts(recipe: Recipe) -> TokenCounts:
    """Tokens per micro batch and rank: T = S b / CP and t = T / TP (arXiv:2205.05198, 4.2.2)."""
    parallel = recipe.parallel
    gathered = recipe.seq_len * recipe.micro_batch_size // parallel.context
    sharded = gathered // parallel.tensor if parallel.sequence_parallel else gathered
    return TokenCounts(gathered=gathered, sharded=sharded)


def multiplies_experts_row_wise(recipe: Recipe) -> bool:
    """Whether outputs and input gradients of the routed experts, and nothing else, are products in FP8, whose
    factors are quantized for them (harness/kernels/fp8_grouped.py).
    """
    return recipe.precision == "fp8_rowwise"


def keeps_experts_row_wise(recipe: Recipe) -> bool:
    """Whether the FP8 copies of these experts' weights stay over a step; Megatron-FSDP's weights do not stay
    themselves, and are quantized at every use.
    """
    return multiplies_experts_row_wise(recipe) and recipe.parallel.data_sharding != "megatron_fsdp"


def activation_element_bytes(recipe: Recipe) -> int:
    """Bytes of one activation element: 4 in FP32, 2 otherwise."""
    return 4 if recipe.precision == "fp32" else 2
