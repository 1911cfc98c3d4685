"""How far measured operations lie from their law, and what that says of a shape between them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

NUM_NEIGHBOURS = 16
MAX_OCTAVES = 1.5
"""No measurement within this distance in log2 of the sizes: nothing is known about the shape."""
_RIDGE = 0.3
"""Weight that holds slopes near zero: few or collinear neighbours then give a weighted mean."""
_NEAR_OCTAVES = 0.05
_SAME_OCTAVES = 1e-6


@dataclass(frozen=True, slots=True)
class Miss:
    """A lookup that no evidence answers, and why; the law answers instead."""

    reason: str


class NearestShapes:
    """Measured over law, interpolated in the logarithms of an operation's sizes.

    A plane through the sixteen nearest measurements in log2 of the sizes, weighted by 1 / distance, within
    the range of their values, so that it holds beyond them: of the methods tried, the one that predicts
    left-out measurements best (docs/rates.md, benchmarks/table_errors.py). Ratios to the law rather than
    times, because they vary least: aiconfigurator's idea of a ratio to the speed of light.
    """

    def __init__(self, sizes: npt.ArrayLike, ratios: npt.ArrayLike) -> None:
        """`sizes` [measurement, dimension] of at least one operation, `ratios` [measurement], positive."""
        from scipy.spatial import KDTree

        self._points: Floats = np.log2(np.asarray(sizes, dtype=np.float64))
        self._logarithms: Floats = np.log(np.asarray(ratios, dtype=np.float64))
        self._tree = KDTree(self._points)

    def __len__(self) -> int:
        return len(self._logarithms)

    def lookup(self, sizes: tuple[float, ...]) -> float | Miss:
        """Measured time over the law's at `sizes`; a miss beyond MAX_OCTAVES from every measurement."""
        point = np.log2(np.array(sizes, dtype=np.float64))
        number = min(NUM_NEIGHBOURS, len(self))
        distances, indices = self._tree.query(point, k=[*range(1, number + 1)])
        if distances[0] > MAX_OCTAVES:
            return Miss(f"the nearest measured shape is {distances[0]:.1f} octaves away")
        if distances[0] < _SAME_OCTAVES:
            same = indices[distances < _SAME_OCTAVES]
            return float(np.exp(np.median(self._logarithms[same])))
        return float(np.exp(self._plane(point, distances, indices)))

    def _plane(self, point: Floats, distances: Floats, indices: npt.NDArray[np.intp]) -> float:
        """Value at `point` of the plane through neighbours, by weighted least squares with a ridge."""
        values = self._logarithms[indices]
        columns = np.column_stack([np.ones(len(indices)), self._points[indices] - point])
        weighted = columns / np.maximum(distances, _NEAR_OCTAVES)[:, None]
        ridge = np.diag([0.0, *[_RIDGE] * len(point)])
        level = np.linalg.solve(weighted.T @ columns + ridge, weighted.T @ values)[0]
        return float(np.clip(level, values.min(), values.max()))
