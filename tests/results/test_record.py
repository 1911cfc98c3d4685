"""A record reduces its ranks by the slowest, for a step ends when the last rank does."""

from tests.results.records import record


def test_a_step_takes_as_long_as_its_slowest_rank() -> None:
    assert record(step_times_s=((0.1, 0.2, 0.1), (0.2, 0.1, 0.15))).slowest_step_times_s() == (0.2, 0.2, 0.15)


def test_the_slowest_rank_is_the_one_with_the_largest_total() -> None:
    assert record(step_times_s=((0.1, 0.1), (0.1, 0.3), (0.2, 0.1))).slowest_rank() == 1
