"""What squeue and sacct print, as Slurm 22.05 does, is understood; what they cannot say is told."""

import pytest

from moe_bench.errors import SchedulerError
from moe_bench.launch.job_state import SLURM_STATES, JobState
from moe_bench.launch.runner import run_captured
from moe_bench.launch.slurm_state import SlurmJob, accounted_jobs, job_output, remembered_jobs
from tests.launch.conftest import FakeRunner

QUEUE = """\
4|CANCELLED|Resources|0|0|
1|COMPLETED|None|0|0|
2|FAILED|NonZeroExitCode|0|768|
6|PENDING|BeginTime|1|0|
7|PENDING|Resources|0|0|
5|TIMEOUT|TimeLimit|0|15|
"""
ACCOUNTS = """\
8|COMPLETED|0:0
8.batch|COMPLETED|0:0
9|CANCELLED by 1000|0:0
10|FAILED|1:0
10.batch|FAILED|1:0
10.0|OUT_OF_MEMORY|0:125
11|NODE_FAIL|0:9
"""


def test_what_the_controller_remembers_is_read() -> None:
    told = remembered_jobs(FakeRunner({"squeue": QUEUE}))
    assert told.problem is None
    assert told.jobs[2] == SlurmJob(state="FAILED", reason="NonZeroExitCode", exit_code=3)
    assert told.jobs[5] == SlurmJob(state="TIMEOUT", reason="TimeLimit", signal=15)
    assert told.jobs[6] == SlurmJob(state="PENDING", reason="BeginTime", num_restarts=1)
    assert {number: job.meaning.value for number, job in told.jobs.items()} == {
        1: "done", 2: "failed", 4: "cancelled", 5: "timed out", 6: "requeued", 7: "submitted",
    }  # fmt: skip


def test_what_accounting_has_kept_is_read_and_a_step_without_memory_speaks_for_its_job() -> None:
    runner = FakeRunner({"sacct": ACCOUNTS})
    told = accounted_jobs({9, 8, 10, 11}, runner)
    assert "--jobs=8,9,10,11" in runner.commands[0]
    assert {number: job.meaning.value for number, job in told.jobs.items()} == {
        8: "done", 9: "cancelled", 10: "out of memory", 11: "failed",
    }  # fmt: skip
    assert told.jobs[10].reason == "step 0"


def test_without_a_question_accounting_is_not_asked() -> None:
    runner = FakeRunner({})
    assert accounted_jobs(set(), runner).jobs == {}
    assert runner.commands == []


@pytest.mark.parametrize("ask", [remembered_jobs, lambda run: accounted_jobs({1}, run)])
def test_what_cannot_answer_says_why(ask, monkeypatch: pytest.MonkeyPatch) -> None:
    told = ask(FakeRunner({}, code=1, stderr="error: a\nSlurm accounting storage is disabled\n"))
    assert told.problem is not None
    assert told.problem.endswith(": Slurm accounting storage is disabled")
    monkeypatch.setenv("PATH", "/no programs/here")
    told = ask(run_captured)
    assert told.problem is not None
    assert told.problem.endswith(": not installed here")
    assert told.problem.count(":") == 1


def test_the_output_of_a_job_is_where_slurm_says_with_spaces_in_it() -> None:
    told = "   WorkDir=/home/me\n   StdErr=/home/me/my runs/7.err\n   StdOut=/home/me/my runs/7.out\n"
    assert job_output(7, FakeRunner({"show job 7": told})) == "/home/me/my runs/7.out"
    with pytest.raises(SchedulerError, match="job 7: Invalid job id specified"):
        job_output(7, FakeRunner({}, code=1, stderr="Invalid job id specified\n"))


def test_every_state_that_waits_or_runs_has_not_ended() -> None:
    going_on = {state for state, meaning in SLURM_STATES.items() if not meaning.has_ended}
    assert {"PENDING", "RUNNING", "COMPLETING", "REQUEUED", "SUSPENDED"} <= going_on
    assert not {"COMPLETED", "FAILED", "TIMEOUT", "OUT_OF_MEMORY", "CANCELLED", "NODE_FAIL"} & going_on


def test_a_word_of_a_newer_slurm_is_unknown() -> None:
    assert SlurmJob(state="EXPEDITING").meaning is JobState.UNKNOWN
