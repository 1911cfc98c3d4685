"""Seconds of whole calls of a MoE layer, forward and backward."""

from __future__ import annotations

import statistics

from pydantic import Field

from moe_bench.spec.base import PositiveFloat, Spec


class WholeSamples(Spec):
    """Calls of the layer without marks inside it, forward and backward of the same call."""

    forward_s: tuple[PositiveFloat, ...] = Field(min_length=1)
    backward_s: tuple[PositiveFloat, ...] = Field(min_length=1)

    @property
    def total_s(self) -> tuple[float, ...]:
        """Forward and backward of each call."""
        return tuple(map(sum, zip(self.forward_s, self.backward_s, strict=True)))

    @property
    def median_s(self) -> float:
        """Median of forward and backward together."""
        return statistics.median(self.total_s)

    @property
    def spread_fraction(self) -> float:
        """Distance of the quartiles over the median; 0 of a single call."""
        if len(self.total_s) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.total_s, n=4, method="inclusive")
        return (high - low) / self.median_s
