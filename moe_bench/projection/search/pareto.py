"""The fastest under each of several memory ceilings: a Pareto front at a stated resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

CEILING_FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the usable memory."""


@dataclass(slots=True)
class Front:
    """The best times found so far, and what could still change them.

    Something that takes at least t seconds and b bytes matters only while t is below `limit_s(b)`.
    """

    usable_bytes: int
    num_wanted: int
    """How many different times are asked for, the fastest first, whatever the memory."""
    ceilings: Sequence[float] = CEILING_FRACTIONS
    _fastest_s: list[float] = field(default_factory=list)
    _best_s: list[float] = field(init=False)

    def __post_init__(self) -> None:
        """Nothing has been found under any ceiling."""
        self._best_s = [math.inf] * len(self.ceilings)

    def add(self, step_s: float, num_bytes: int) -> None:
        """One that fits."""
        self._fastest_s = sorted({*self._fastest_s, step_s})[: self.num_wanted]
        for index, ceiling in enumerate(self.ceilings):
            if num_bytes <= ceiling * self.usable_bytes:
                self._best_s[index] = min(self._best_s[index], step_s)

    def limit_s(self, num_bytes: float) -> float:
        """Time at and above which something of at least `num_bytes` is neither wanted nor best anywhere."""
        for ceiling, best_s in zip(self.ceilings, self._best_s, strict=True):
            if num_bytes <= ceiling * self.usable_bytes:
                return max(best_s, self.slowest_wanted_s)
        return self.slowest_wanted_s

    @property
    def slowest_wanted_s(self) -> float:
        """The slowest of the fastest that were asked for; infinite while there are fewer."""
        return self._fastest_s[-1] if len(self._fastest_s) == self.num_wanted else math.inf
