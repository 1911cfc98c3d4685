"""What Slurm says of jobs: its controller of those it remembers, accounting of others where there is any."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from moe_bench.errors import SchedulerError
from moe_bench.launch.job_state import SLURM_STATES, JobState
from moe_bench.launch.runner import Runner

SQUEUE = (
    "squeue",
    "--me",
    "--states=all",
    "--noheader",
    "--Format=JobID:|,State:|,Reason:|,RestartCnt:|,exit_code:|",
)
"""Everything that the controller remembers of this user: ended jobs for MinJobAge, 5 minutes by default."""
SACCT = ("sacct", "--noheader", "--parsable2", "--format=JobIDRaw,State,ExitCode")
_SIGNAL_BITS = 0x7F


@dataclass(frozen=True, slots=True, kw_only=True)
class SlurmJob:
    """One job in Slurm's words."""

    state: str
    """`RUNNING`, `NODE_FAIL` and so on."""
    reason: str = ""
    """Why it waits or ended, where the controller says so."""
    exit_code: int = 0
    signal: int = 0
    num_restarts: int = 0

    @property
    def meaning(self) -> JobState:
        """The state in our words; a job that waits again is requeued."""
        state = SLURM_STATES.get(self.state, JobState.UNKNOWN)
        return JobState.REQUEUED if state is JobState.SUBMITTED and self.num_restarts else state


@dataclass(frozen=True, slots=True, kw_only=True)
class Told:
    """What one of Slurm's commands has told, by job number, or why it has not."""

    jobs: dict[int, SlurmJob]
    problem: str | None = None


def remembered_jobs(run: Runner) -> Told:
    """The jobs of this user that the controller remembers."""
    done = run(SQUEUE)
    if done.returncode:
        return Told(jobs={}, problem=_problem("squeue", done.stderr))
    jobs = {}
    for line in done.stdout.splitlines():
        number, state, reason, restarts, status = line.rstrip("|").split("|")
        jobs[int(number)] = SlurmJob(
            state=state,
            reason="" if reason == "None" else reason,
            # as wait(2) gives it
            exit_code=int(status) >> 8,
            signal=int(status) & _SIGNAL_BITS,
            num_restarts=int(restarts),
        )
    return Told(jobs=jobs)


def accounted_jobs(numbers: Collection[int], run: Runner) -> Told:
    """What accounting has kept of the jobs `numbers`; a step that ran out of memory speaks for its job."""
    if not numbers:
        return Told(jobs={})
    done = run((*SACCT, f"--jobs={','.join(map(str, sorted(numbers)))}"))
    if done.returncode:
        return Told(jobs={}, problem=_problem("sacct", done.stderr))
    jobs: dict[int, SlurmJob] = {}
    for line in done.stdout.splitlines():
        name, state, status = line.split("|")
        number, _, step = name.partition(".")
        if not step:
            code, _, signal = status.partition(":")
            # `CANCELLED by 1000`
            jobs[int(number)] = SlurmJob(state=state.split()[0], exit_code=int(code), signal=int(signal))
        elif state == "OUT_OF_MEMORY":
            jobs[int(number)] = SlurmJob(state=state, reason=f"step {step}")
    return Told(jobs=jobs)


def job_output(number: int, run: Runner) -> str:
    """The file that the output of a running job goes to. Raises SchedulerError where Slurm does not say."""
    done = run(("scontrol", "show", "job", str(number)))
    for line in done.stdout.splitlines():
        name, _, value = line.strip().partition("=")
        if name == "StdOut":
            return value
    raise SchedulerError(f"job {number}: {done.stderr.strip() or 'scontrol names no StdOut'}")


def _problem(command: str, stderr: str) -> str:
    """The last line that a failed command wrote; `squeue: not installed here` comes from our own runner."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "it failed without a word"
    return last if last.startswith(f"{command}:") else f"{command}: {last}"
