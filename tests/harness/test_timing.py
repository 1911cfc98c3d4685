"""The timing loops on a made-up device that runs behind its host, and so with a clock that is exact."""

from __future__ import annotations

import pytest

from moe_bench.harness.timing import HostClock, burst_samples_s, held_samples_s, samples_s
from moe_bench.results.calibration_tasks import MAX_SAMPLES, MIN_SAMPLES, NUM_BURSTS, NUM_WARMUP

FLUSH_S = 0.0001


class MadeUpDevice:
    """A queue of work: a call takes as long as it says, and longer once the device has run for a while."""

    is_cold = True

    def __init__(self, call_s: float, *, hot_after_s: float = float("inf")) -> None:
        self.now_s = 0.0
        self.busy_s = 0.0
        self.call_s, self.hot_after_s = call_s, hot_after_s
        self.num_calls = 0
        self.num_flushes = 0
        self.pauses: list[float] = []

    def mark(self) -> float:
        return self.now_s

    def between_s(self, start: float, end: float) -> float:
        return end - start

    def flush(self) -> None:
        self.num_flushes += 1
        self.now_s += FLUSH_S

    def call(self) -> None:
        self.num_calls += 1
        took_s = self.call_s * (1.25 if self.busy_s >= self.hot_after_s else 1.0)
        self.now_s += took_s
        self.busy_s += took_s

    def pause(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.busy_s = 0.0


@pytest.mark.parametrize(
    ("call_s", "number"), [(1.0, MIN_SAMPLES), (1e-5, MAX_SAMPLES), (0.1 / 25 - FLUSH_S, 25)]
)
def test_short_calls_are_timed_more_often_each_with_a_flush_outside_of_its_time(
    call_s: float, number: int
) -> None:
    device = MadeUpDevice(call_s)
    found = samples_s(device.call, device)
    assert found == pytest.approx((call_s,) * number)
    assert device.num_calls == device.num_flushes == number + NUM_WARMUP


def test_what_is_done_before_a_call_is_not_in_its_time() -> None:
    device = MadeUpDevice(1e-5)
    other = MadeUpDevice(1.0)

    def before() -> None:
        other.call()
        device.now_s += 1.0

    assert samples_s(device.call, device, before=before) == pytest.approx((1e-5,) * MIN_SAMPLES)
    assert other.num_calls == device.num_calls


def test_what_is_held_runs_without_a_pause_for_as_long_as_asked() -> None:
    device = MadeUpDevice(0.01, hot_after_s=1.0)
    found = held_samples_s(device.call, device, 2.0, window_s=0.25)
    assert device.busy_s >= 2.0
    assert device.busy_s < 2.0 + 4 * 0.25
    assert device.num_flushes == 0
    assert found[0] == pytest.approx(0.01)
    assert found[-1] == pytest.approx(0.0125)


def test_bursts_end_before_the_device_is_hot() -> None:
    device = MadeUpDevice(0.001, hot_after_s=0.5)
    found = burst_samples_s(device.call, device, pause=device.pause, pause_s=2.0)
    assert found == pytest.approx((0.001,) * NUM_BURSTS)
    assert device.pauses == [2.0] * NUM_BURSTS


def test_a_host_keeps_its_caches_and_says_so() -> None:
    clock = HostClock()
    start = clock.mark()
    clock.flush()
    assert not clock.is_cold
    assert clock.between_s(start, start + 1.5) == 1.5
