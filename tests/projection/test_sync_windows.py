"""Data-parallel traffic hides in the windows of the simulated pipeline, share by share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.projection.schedule.simulation import ChunkTime, ScheduleKind, Timeline
from moe_bench.projection.sync_windows import exposed_s, gathering_windows_s, reduction_windows_s
from tests.projection.schedule.simulate import simulate

WINDOWS = st.lists(st.floats(0, 10), min_size=1, max_size=8)


def timeline(num_virtual: int = 2) -> Timeline:
    """PP2, forward passes of 1 s and backward passes of 2 s, no transfers."""
    return simulate(
        ScheduleKind.INTERLEAVED if num_virtual > 1 else ScheduleKind.ONE_F_ONE_B,
        num_ranks=2,
        num_virtual=num_virtual,
        num_micro_batches=4,
        micro_batch_group_size=2,
        chunks=[ChunkTime(forward_s=1.0, dgrad_s=1.0, wgrad_s=1.0)] * (2 * num_virtual),
        transfer_s=0.0,
        overlaps_transfer=num_virtual > 1,
    )


def test_one_window_hides_as_much_as_it_lasts() -> None:
    assert exposed_s([3.0], 5.0) == pytest.approx(2.0)
    assert exposed_s([3.0], 2.0) == 0.0


def test_a_share_waits_for_those_before_it() -> None:
    # two shares of 2 s: the last one has nothing to hide in, the other 5 s
    assert exposed_s([0.0, 5.0], 4.0) == pytest.approx(2.0)
    # both must pass within 1 s of the end
    assert exposed_s([0.0, 1.0], 4.0) == pytest.approx(3.0)


@given(WINDOWS, st.floats(0, 100))
def test_what_is_exposed_lies_between_nothing_and_all_of_it(windows_s: list[float], traffic_s: float) -> None:
    assert 0 <= exposed_s(windows_s, traffic_s) <= traffic_s * (1 + 1e-12)


@given(WINDOWS, st.floats(0, 100), st.floats(0, 5))
def test_wider_windows_hide_more(windows_s: list[float], traffic_s: float, wider_s: float) -> None:
    wider = [window + wider_s for window in windows_s]
    assert exposed_s(wider, traffic_s) <= exposed_s(windows_s, traffic_s)


def test_the_last_chunk_of_the_first_rank_ends_the_step() -> None:
    windows = reduction_windows_s(timeline(), 0, num_buckets=2)
    assert len(windows) == 2
    assert min(windows) == 0.0  # one bucket per chunk: it leaves when its last backward pass ends
    assert max(windows) >= 2.0  # the other chunk is done one backward pass earlier, at least


def test_more_buckets_leave_within_the_last_backward_pass() -> None:
    one, four = (min(reduction_windows_s(timeline(), 0, num_buckets=number)) for number in (2, 8))
    assert four - one == pytest.approx(2.0 * 3 / 4)


def test_weights_of_a_later_chunk_are_needed_later() -> None:
    windows = gathering_windows_s(timeline(), 0, num_buckets=2)
    assert windows[0] == 0.0
    assert windows[1] == pytest.approx(2.0)  # two micro batches pass the first chunk before


def test_a_rank_down_the_pipeline_has_time_until_its_first_input_comes() -> None:
    assert gathering_windows_s(timeline(1), 1, num_buckets=1) == pytest.approx((1.0,))
