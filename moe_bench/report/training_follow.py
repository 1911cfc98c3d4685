"""Writes down what a training run says as it goes, judges its experts, and tells whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from moe_bench.report.export.training import TrainingEvents
from moe_bench.results.training_health import AlarmWatch, HealthLine, append_health, read_health
from moe_bench.results.training_log import LogLine, append_line
from moe_bench.results.training_run import begin_run, go_on
from moe_bench.spec.training import TrainingJob


@dataclass(slots=True, kw_only=True)
class Follower:
    """What hears the steps of one run, on the one rank that is told of them."""

    job: TrainingJob
    folder: Path
    goes_on: bool
    """Whether the run was begun before."""
    tensorboard: Path | None
    """Folder of event files; None for none."""
    console: Console
    on_line: Callable[[LogLine], None]
    """Called with each line that was written."""
    _alarms: AlarmWatch | None = field(default=None, init=False)
    _events: TrainingEvents | None = field(default=None, init=False)

    def hear_line(self, line: LogLine) -> None:
        """Of one step."""
        self._begin(line.step)
        append_line(self.folder, line)
        if self._events is not None:
            self._events.add_line(line)
        self.on_line(line)

    def hear_health(self, line: HealthLine) -> None:
        """Of the experts; alarms are printed."""
        alarms = self._begin(line.step - line.num_steps + 1)
        judged = alarms.judged(line)
        append_health(self.folder, judged)
        if self._events is not None:
            self._events.add_health(judged)
        for alarm in judged.alarms:
            self.console.print(f"ALARM {alarm.text}", highlight=False)

    def close(self) -> None:
        """Finish the event files."""
        if self._events is not None:
            self._events.close()

    def _begin(self, first_step: int) -> AlarmWatch:
        """What the first of all lines does.

        Only then is it known that data and checkpoint could be read under the job, and only then have ranks
        been forked, which a writer's thread would forbid.
        """
        if self._alarms is None:
            if self.goes_on:
                go_on(self.folder, self.job, num_steps=first_step - 1)
            else:
                begin_run(self.folder, self.job)
            self._alarms = AlarmWatch(self.job.health, read_health(self.folder))
            if self.tensorboard is not None:
                self._events = TrainingEvents(self.tensorboard, first_step=first_step)
        return self._alarms
