"""May this run produce a number? Every check that ends one with a name instead."""

from __future__ import annotations

import math
from collections.abc import Sequence

from moe_bench.errors import MeasurementError
from moe_bench.harness.routing import ExpertLoad


def require_finite(*, rank: int, step: int, loss: float | None, grad_norm: float, was_applied: bool) -> None:
    """Stop at the first step, counted from 1, whose loss or gradient norm is not a number to divide by."""
    for name, value in (("loss", loss), ("gradient norm", grad_norm)):
        if value is not None and not math.isfinite(value):
            raise MeasurementError(f"rank {rank}: {name} is {value} in step {step}")
    if not was_applied:
        raise MeasurementError(f"rank {rank}: the optimizer skipped step {step}: a gradient is not finite")


def require_gpu(*, rank: int, expected: str, found: str) -> None:
    """Stop before measuring on hardware that the recipe does not name."""
    if found != expected:
        raise MeasurementError(
            f"rank {rank}: the recipe is for {expected!r}, this GPU is {found!r}; "
            "use a recipe for it, or add its datasheet under recipes/systems/"
        )


def require_no_drops(loads: Sequence[ExpertLoad], *, tokens_per_step: int, top_k: int) -> None:
    """Stop if an expert layer lost tokens in a run without a capacity limit."""
    expected = tokens_per_step * top_k
    for load in loads:
        for step, tokens in enumerate(load.tokens_per_step, start=1):
            num_lost = expected - sum(tokens)
            if num_lost > 0:
                raise MeasurementError(
                    f"layer {load.name}: {num_lost} of {expected} token copies were dropped in step {step}, "
                    "and the recipe sets no capacity"
                )


def require_balance(loads: Sequence[ExpertLoad], *, num_micro_batches: int) -> None:
    """Stop if round-robin routing was not exact.

    All ranks together deal out each micro batch from the first expert on, so two experts may differ by one
    token for each of a step's micro batches.
    """
    for load in loads:
        for step, tokens in enumerate(load.tokens_per_step, start=1):
            if max(tokens) - min(tokens) > num_micro_batches:
                raise MeasurementError(
                    f"layer {load.name}: round robin gave {min(tokens)} to {max(tokens)} tokens per expert "
                    f"in step {step}; equal shares were asked for"
                )


def require_all_ranks(ranks: Sequence[int], *, world_size: int) -> None:
    """Stop if some rank did not report."""
    missing = sorted(set(range(world_size)) - set(ranks))
    if missing:
        raise MeasurementError(f"no samples from rank {', '.join(map(str, missing))} of {world_size}")
