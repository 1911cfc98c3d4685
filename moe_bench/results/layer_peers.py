"""One MoE layer run by several engines on the same weights and inputs: who agreed, and how long each took."""

from __future__ import annotations

import math
import statistics
from typing import Literal, Self

from pydantic import Field, model_validator

from moe_bench.results.layer_samples import WholeSamples
from moe_bench.spec.base import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, Spec, Text
from moe_bench.spec.layer_case import LayerCase

Outcome = Literal["measured", "unable", "disagrees", "failed"]
"""`unable`: not installed, or it does not compute this layer here, for the reason it gives. `disagrees`: it
ran, and its numbers are not those of the reference, so its time would mean nothing. `failed`: it raised an
error, such as being out of memory."""
Pass = Literal["forward", "forward and backward"]


class TensorDifference(Spec):
    """How far one tensor of an engine is from the reference."""

    tensor: Text
    """`output`, or what it is the gradient of: `input` or a weight, as `fc1`."""
    difference_fraction: NonNegativeFloat | None
    """The larger of |a - r|_2 / |r|_2 and |a - r|_max / |r|_max; null where a value is not finite."""

    def order(self) -> float:
        """The difference, a value that is not finite beyond all others."""
        return math.inf if self.difference_fraction is None else self.difference_fraction


class EngineTimes(Spec):
    """What one engine took; in every round all engines had their turn."""

    rounds: tuple[WholeSamples, ...] = Field(min_length=1)
    peak_bytes: NonNegativeInt | None
    """The most that one forward and backward pass allocated beyond weights and inputs, gradients included;
    null without a GPU."""

    def medians_s(self, which: Pass) -> tuple[float, ...]:
        """Median of every round."""
        if which == "forward":
            return tuple(statistics.median(one.forward_s) for one in self.rounds)
        return tuple(one.median_s for one in self.rounds)


class EngineResult(Spec):
    """What became of one engine."""

    engine: Text
    package: Text
    """Distribution that it comes from."""
    version: Text | None
    """Of the package; null where it is not installed."""
    outcome: Outcome
    reason: Text | None = None
    """In words, unless it was measured."""
    implementation: Text | None = None
    """Classes or kernels that really stood in the layer."""
    differences: tuple[TensorDifference, ...] = ()
    times: EngineTimes | None = None

    @model_validator(mode="after")
    def _require_what_belongs(self) -> Self:
        if (self.outcome == "measured") != (self.times is not None):
            raise ValueError(f"{self.engine}: {self.outcome}, so times must be given if and only if measured")
        if (self.outcome == "measured") == (self.reason is not None):
            raise ValueError(f"{self.engine}: {self.outcome}, so a reason must be given unless measured")
        return self

    @property
    def worst(self) -> TensorDifference | None:
        """The tensor that is furthest from the reference; None where nothing was compared."""
        return max(self.differences, key=TensorDifference.order, default=None)


class PeerRatio(Spec):
    """How many times as long one engine took as the baseline, paired round by round."""

    median_ratio: PositiveFloat
    lowest_ratio: PositiveFloat
    highest_ratio: PositiveFloat


class LayerPeers(Spec):
    """A comparison: every engine that was asked for, measured or not."""

    case: LayerCase
    """As all engines ran it: one rank's experts as a layer of their own."""
    differences: tuple[Text, ...] = ()
    """What is otherwise in it than in the layer that was asked for, a sentence each."""
    baseline: Text
    """Engine that the others' times are divided by."""
    num_checked_tokens: PositiveInt
    """First tokens of the case, on which outputs and gradients were compared with the float64 reference."""
    allowed_fraction: PositiveFloat
    """Difference up to which an engine agrees."""
    engines: tuple[EngineResult, ...] = Field(min_length=1)

    def engine(self, name: str) -> EngineResult | None:
        """What became of `name`; None where it was not asked for."""
        return next((one for one in self.engines if one.engine == name), None)

    def ratio(self, name: str, which: Pass) -> PeerRatio | None:
        """Time of `name` over the baseline's; None unless both were measured."""
        mine, base = self.engine(name), self.engine(self.baseline)
        if mine is None or base is None or mine.times is None or base.times is None:
            return None
        pairs = zip(mine.times.medians_s(which), base.times.medians_s(which), strict=True)
        ratios = [peer_s / baseline_s for peer_s, baseline_s in pairs]
        return PeerRatio(
            median_ratio=statistics.median(ratios), lowest_ratio=min(ratios), highest_ratio=max(ratios)
        )
