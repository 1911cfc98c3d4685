"""Interpolation between measured shapes: exact on them, a plane between, held beyond, silent far away."""

from __future__ import annotations

import itertools
import math

import pytest

from moe_bench.projection.evidence.nearest_shapes import MAX_OCTAVES, Miss, NearestShapes

GRID = [tuple(map(float, sizes)) for sizes in itertools.product((512, 1024, 2048, 4096), repeat=3)]


def found(shapes: NearestShapes, *sizes: float) -> float:
    answer = shapes.lookup(sizes)
    assert not isinstance(answer, Miss)
    return answer


def test_a_measured_shape_is_answered_with_its_own_ratio() -> None:
    ratios = [1 + 0.01 * index for index in range(len(GRID))]
    shapes = NearestShapes(GRID, ratios)
    assert found(shapes, *GRID[17]) == pytest.approx(ratios[17])


def test_repeated_measurements_of_a_shape_count_with_their_median() -> None:
    shapes = NearestShapes([(8.0,), (8.0,), (8.0,)], [1.0, 1.1, 4.0])
    assert found(shapes, 8.0) == pytest.approx(1.1)


def test_a_ratio_that_is_a_power_of_the_sizes_is_recovered_between_them() -> None:
    def ratio(rows: float, inner: float, columns: float) -> float:
        return 1.2 * (rows / 1024) ** 0.2 * (columns / 1024) ** -0.1

    shapes = NearestShapes(GRID, [ratio(*sizes) for sizes in GRID])
    between = (1400.0, 1500.0, 1300.0)
    assert found(shapes, *between) == pytest.approx(ratio(*between), rel=0.02)


def test_beyond_the_measured_shapes_the_ratio_stays_within_theirs() -> None:
    shapes = NearestShapes([(2.0**power,) for power in range(8, 13)], [1.0, 1.1, 1.2, 1.3, 1.4])
    assert found(shapes, 2.0**13) == pytest.approx(1.4, rel=0.05)
    assert found(shapes, 2.0**13) <= 1.4


def test_a_shape_far_from_all_measured_ones_is_a_miss_that_says_how_far() -> None:
    answer = NearestShapes([(1024.0, 1024.0)], [1.0]).lookup((1024.0, 8192.0))
    assert answer == Miss("the nearest measured shape is 3.0 octaves away")
    assert math.log2(8) > MAX_OCTAVES


def test_a_single_measurement_answers_for_its_neighbourhood() -> None:
    assert found(NearestShapes([(1024.0,)], [0.7]), 1500.0) == pytest.approx(0.7)
