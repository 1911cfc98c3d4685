"""The timing loop on made-up time: what is inside the interval, what is outside, and in which order."""

from __future__ import annotations

from moe_bench.harness.loop import timed_steps


class FakeMachine:
    """A clock that moves only when something runs, and a device that works on after a call returns."""

    def __init__(self) -> None:
        self.clock_s = 0.0
        self.queued_s = 0.0
        self.log: list[str] = []

    def prepare(self, step: int) -> int:
        self.clock_s += 1000.0
        self.log.append(f"prepare {step}")
        return step

    def run(self, step: int) -> str:
        self.clock_s += 1.0
        self.queued_s += 10.0 * step
        self.log.append(f"run {step}")
        return f"outcome {step}"

    def finish(self, step: int, outcome: str) -> None:
        self.clock_s += 500.0
        self.log.append(f"finish {step}: {outcome}")

    def synchronize(self) -> None:
        self.clock_s += self.queued_s
        self.queued_s = 0.0

    def time(self, steps: range) -> tuple[float, ...]:
        return timed_steps(
            steps,
            prepare=self.prepare,
            run=self.run,
            finish=self.finish,
            now_s=lambda: self.clock_s,
            synchronize=self.synchronize,
        )


def test_a_step_takes_its_call_and_the_device_work_that_it_queued() -> None:
    assert FakeMachine().time(range(1, 4)) == (11.0, 21.0, 31.0)


def test_device_work_from_before_a_step_is_not_counted_into_it() -> None:
    machine = FakeMachine()
    machine.queued_s = 7.0
    assert machine.time(range(2, 3)) == (21.0,)


def test_each_step_is_prepared_run_and_finished_before_the_next() -> None:
    machine = FakeMachine()
    machine.time(range(5, 7))
    assert machine.log == [
        "prepare 5",
        "run 5",
        "finish 5: outcome 5",
        "prepare 6",
        "run 6",
        "finish 6: outcome 6",
    ]
