"""How well a projected number is founded: the grade that every lookup carries."""

from __future__ import annotations

from enum import IntEnum


class Grade(IntEnum):
    """Evidence behind a number, best first; a sum carries the worst grade of its parts."""

    MEASURED_HERE = 0
    """Interpolated between measurements of results/calibration on this GPU."""
    MEASURED_ELSEWHERE = 1
    """Interpolated between public measurements on this GPU (`aiconfigurator-core`)."""
    PUBLISHED = 2
    """A law fitted to public measurements on this GPU."""
    FITTED = 3
    """A constant fitted to published training throughput."""
    PRIOR = 4
    """A datasheet figure with a stated share of it."""

    @property
    def label(self) -> str:
        """As reports print it."""
        return self.name.lower().replace("_", " ")
