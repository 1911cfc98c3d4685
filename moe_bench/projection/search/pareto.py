"""The fastest under each of several memory ceilings: a Pareto front at a stated resolution."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

CEILING_FRACTIONS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Of the usable memory."""


@dataclass(slots=True)
class Front:
    """The best times found so far, and what could still change them.

    Something that takes at least t seconds and b bytes matters only while t is below `limit_s(b)`. Of points
    of one group the fastest alone is wanted.
    """

    usable_bytes: int
    num_wanted: int
    """How many groups are asked for, by their fastest, whatever the memory."""
    ceilings: Sequence[float] = CEILING_FRACTIONS
    _fastest_s: dict[Hashable, float] = field(default_factory=dict)
    _slowest_wanted_s: float = math.inf
    _best_s: list[float] = field(init=False)

    def __post_init__(self) -> None:
        """Nothing has been found under any ceiling."""
        self._best_s = [math.inf] * len(self.ceilings)

    def add(self, step_s: float, num_bytes: int, *, group: Hashable) -> None:
        """One that fits."""
        if step_s < self._fastest_s.get(group, math.inf):
            self._fastest_s[group] = step_s
            if len(self._fastest_s) >= self.num_wanted:
                self._slowest_wanted_s = sorted(self._fastest_s.values())[self.num_wanted - 1]
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
        """The slowest of the fastest groups that were asked for; infinite while there are fewer."""
        return self._slowest_wanted_s
