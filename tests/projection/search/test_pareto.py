"""What the front of memory and speed lets pass, and what it cannot."""

import math

from moe_bench.projection.search.pareto import Front


def front(*points: tuple[float, int], num_wanted: int = 2) -> Front:
    made = Front(usable_bytes=100, num_wanted=num_wanted, ceilings=(0.5, 1.0))
    for group, (step_s, num_bytes) in enumerate(points):
        made.add(step_s, num_bytes, group=group)
    return made


def test_everything_matters_while_fewer_were_found_than_are_wanted() -> None:
    assert front((1.0, 90)).limit_s(95) == math.inf


def test_the_slowest_wanted_is_the_limit_of_what_fills_the_memory() -> None:
    assert front((1.0, 90), (3.0, 90), (2.0, 90)).limit_s(95) == 2.0


def test_of_a_group_the_fastest_counts_once() -> None:
    made = front((1.0, 90))
    made.add(2.0, 80, group=0)
    assert made.limit_s(95) == math.inf
    made.add(3.0, 80, group="another")
    made.add(0.5, 80, group=0)
    assert made.limit_s(95) == 3.0


def test_what_is_lean_matters_longer_than_what_is_not() -> None:
    made = front((1.0, 90), (2.0, 90), (5.0, 40))
    assert made.limit_s(95) == 2.0
    assert made.limit_s(45) == 5.0


def test_the_lean_matter_without_end_until_one_of_them_is_found() -> None:
    assert front((1.0, 90), (2.0, 90)).limit_s(45) == math.inf


def test_what_is_above_every_ceiling_is_held_to_the_wanted_alone() -> None:
    assert front((1.0, 40), (2.0, 40)).limit_s(120) == 2.0
