"""Times single calls on a device: warm-up, a cold L2, samples without gaps; the clock is an argument."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

from moe_bench.results.calibration_tasks import (
    BURST_S,
    FLUSH_BYTES,
    NUM_BURSTS,
    NUM_WARMUP,
    PAUSE_S,
    WINDOW_S,
    num_samples,
)

Call = Callable[[], object]


class DeviceMarks(Protocol):
    """What is needed to time work that a device does while the host goes on."""

    def mark(self) -> Any:
        """A point in the device's queue."""

    def between_s(self, start: Any, end: Any) -> float:
        """Seconds between two marks; waits until the second one has passed."""


class DeviceClock(DeviceMarks, Protocol):
    """The same, with a cold L2."""

    @property
    def is_cold(self) -> bool:
        """Whether `flush` empties the L2."""

    def flush(self) -> None:
        """Queue what makes the next call find nothing of its inputs in the L2."""


class CudaMarks:
    """CUDA events on the current stream."""

    def mark(self) -> torch.cuda.Event:
        """An event, recorded."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between_s(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """Seconds between two events; events count milliseconds."""
        end.synchronize()
        return float(start.elapsed_time(end)) * 1e-3


class CudaClock(CudaMarks):
    """The same with a flush, a buffer larger than any L2 that is written over.

    While the device writes it, about 0.1 ms, the host queues the call, so that what is timed waits for no
    launch.
    """

    is_cold = True

    def __init__(self) -> None:
        self._buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def flush(self) -> None:
        """Write the buffer."""
        self._buffer.zero_()


class HostClock:
    """The wall clock of a machine without a GPU, where a call has ended when it returns; caches stay warm."""

    is_cold = False

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def between_s(self, start: float, end: float) -> float:
        """Seconds between two times."""
        return end - start

    def flush(self) -> None:
        """Do nothing."""


def samples_s(call: Call, clock: DeviceClock, *, before: Call | None = None) -> tuple[float, ...]:
    """Seconds of single calls after a warm-up; as many as `num_samples` says of the last warm-up call.

    `before` is called before each of them, and its time is not theirs.
    """

    def prepare() -> None:
        if before is not None:
            before()
        clock.flush()

    probe_s = 0.0
    for _ in range(NUM_WARMUP):
        start = clock.mark()
        prepare()
        call()
        probe_s = clock.between_s(start, clock.mark())
    pairs = []
    for _ in range(num_samples(probe_s)):
        prepare()
        start = clock.mark()
        call()
        pairs.append((start, clock.mark()))
    return tuple(clock.between_s(start, end) for start, end in pairs)


def held_samples_s(
    call: Call, clock: DeviceClock, held_s: float, *, window_s: float = WINDOW_S
) -> tuple[float, ...]:
    """Mean seconds of a call in each window of about `window_s`, back to back for `held_s` or a little more.

    The next window is queued before the last one is waited for, so that the device never pauses.
    """
    num_calls = _calls_in(window_s, call, clock)
    edges = [clock.mark()]
    windows: list[float] = []
    while sum(windows) * num_calls < held_s:
        for _ in range(num_calls):
            call()
        edges.append(clock.mark())
        if len(edges) > 2:
            windows.append(clock.between_s(edges[-3], edges[-2]) / num_calls)
    windows.append(clock.between_s(edges[-2], edges[-1]) / num_calls)
    return tuple(windows)


def burst_samples_s(
    call: Call,
    clock: DeviceClock,
    *,
    pause: Callable[[float], None] = time.sleep,
    pause_s: float = PAUSE_S,
    num_bursts: int = NUM_BURSTS,
) -> tuple[float, ...]:
    """Mean seconds of a call in short bursts, each after a pause in which the device cools down."""
    num_calls = _calls_in(BURST_S, call, clock)
    samples = []
    for _ in range(num_bursts):
        pause(pause_s)
        call()  # wakes the clocks up
        start = clock.mark()
        for _ in range(num_calls):
            call()
        samples.append(clock.between_s(start, clock.mark()) / num_calls)
    return tuple(samples)


def _calls_in(seconds: float, call: Call, clock: DeviceClock) -> int:
    """How many calls take about so long, after a warm-up."""
    call_s = 0.0
    for _ in range(NUM_WARMUP):
        start = clock.mark()
        call()
        call_s = clock.between_s(start, clock.mark())
    return max(1, round(seconds / call_s))
