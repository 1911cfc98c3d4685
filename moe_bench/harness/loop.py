"""The timing loop: the clock and the device's barrier are arguments, so a test can run it on made-up time."""

from __future__ import annotations

from collections.abc import Callable


def timed_steps[Prepared, Outcome](
    steps: range,
    *,
    prepare: Callable[[int], Prepared],
    run: Callable[[Prepared], Outcome],
    finish: Callable[[int, Outcome], None],
    now_s: Callable[[], float],
    synchronize: Callable[[], None],
) -> tuple[float, ...]:
    """Wall time in seconds of `run` in each of `steps`, the device idle at both edges of every interval.

    `prepare` (making the batch) and `finish` (reading the loss, checking it, telling the user) are outside
    the interval. What a training loop cannot do without belongs into `run`, reducing the loss included.
    """
    times_s = []
    for step in steps:
        prepared = prepare(step)
        synchronize()
        start_s = now_s()
        outcome = run(prepared)
        synchronize()
        times_s.append(now_s() - start_s)
        finish(step, outcome)
    return tuple(times_s)
