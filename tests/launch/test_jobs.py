"""What became of every job follows from Slurm, the record and the log, and what is not known is said."""

from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from moe_bench.errors import MeasurementError
from moe_bench.launch.job_state import JobState
from moe_bench.launch.jobs import JobReport, Jobs, all_jobs
from moe_bench.launch.ledger import SubmittedJob, add_to_ledger
from moe_bench.launch.local_runs import noted
from moe_bench.launch.runner import NOT_INSTALLED
from moe_bench.results.entry import Entry, entry_of
from moe_bench.results.summary import summary_of
from tests.results.records import full, record, smoke

TORCH_OOM = "[rank3]: torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.50 GiB."


class Cluster:
    """A Slurm that says of its jobs what it is told; `None` for a command that is not there."""

    def __init__(self, queue: str | None = "", accounts: str | None = None, name: str = "eos") -> None:
        self.answers = {"squeue": queue, "sacct": accounts, "scontrol": f"ClusterName = {name}\n"}

    def __call__(self, command: Sequence[str]) -> CompletedProcess[str]:
        answer = self.answers[command[0]]
        if answer is None:
            return CompletedProcess(command, NOT_INSTALLED, "", f"{command[0]}: not installed here")
        return CompletedProcess(command, 0, answer, "")


def submit(root: Path, job_id: int = 7, *, log: str | None = None, cluster: str = "eos") -> None:
    path = root / f"slurm-{job_id}.out"
    if log is not None:
        path.write_text(log)
    job = SubmittedJob(
        job_id=job_id,
        cluster=cluster,
        submitted_at="2026-11-22T06:00:00+00:00",
        plan=full(),
        repeat=0,
        job_size="1 node x 8 GPUs",
        time_limit_s=3600,
        log=str(path),
        command=("sbatch", "run_recipe.sh"),
    )
    add_to_ledger(root, job)


def entry(job_id: str = "job7", started_at: str = "2026-11-22T07:00:00+00:00") -> Entry:
    return entry_of(summary_of(record(job_id=job_id, started_at=started_at)), Path(f"/results/{job_id}.json"))


def only(jobs: Jobs) -> JobReport:
    (report,) = jobs.reports
    return report


@pytest.mark.parametrize(
    ("queue", "log", "state", "reason"),
    [
        ("7|PENDING|Resources|0|0|", None, JobState.SUBMITTED, "Resources"),
        ("7|RUNNING|None|0|0|", "up", JobState.RUNNING, ""),
        ("7|RUNNING|None|2|0|", "up", JobState.RUNNING, "life 3"),
        ("7|PENDING|BeginTime|1|0|", "up", JobState.REQUEUED, "BeginTime, life 2"),
        ("7|COMPLETED|None|0|0|", "x", JobState.DONE, "it left no record below these results"),
        (
            "7|FAILED|NonZeroExitCode|0|768|",
            "DeepEP is not installed",
            JobState.FAILED,
            "exit code 3, something needed is not here: DeepEP is not installed",
        ),
        ("7|FAILED|NonZeroExitCode|0|256|", f"{TORCH_OOM}\nrank 3 failed", JobState.OUT_OF_MEMORY, TORCH_OOM),
        ("7|OUT_OF_MEMORY|OutOfMemory|0|0|", "", JobState.OUT_OF_MEMORY, "OutOfMemory"),
        ("7|FAILED|RaisedSignal|0|9|", "", JobState.FAILED, "killed by signal 9"),
        ("7|NODE_FAIL|NodeDown|0|0|", "", JobState.FAILED, "NODE_FAIL"),
        ("7|TIMEOUT|TimeLimit|0|15|", "", JobState.TIMED_OUT, "TimeLimit"),
        ("7|CANCELLED|None|0|15|", "", JobState.CANCELLED, ""),
        ("7|EXPEDITING|None|0|0|", "", JobState.UNKNOWN, "Slurm calls it EXPEDITING"),
    ],
)
def test_a_job_that_slurm_knows(
    tmp_path: Path, queue: str, log: str | None, state: JobState, reason: str
) -> None:
    submit(tmp_path, log=log)
    report = only(all_jobs(tmp_path, (), run=Cluster(queue)))
    assert (report.id, report.recipe) == ("7", "qwen3_30b_a3b/h100_sxm_8g_bf16")
    assert (report.state, report.reason) == (state, reason)
    assert (report.log is None) is (log is None)


def test_a_job_with_a_record_is_done_and_slurm_is_not_asked(tmp_path: Path) -> None:
    submit(tmp_path)
    found = all_jobs(tmp_path, (entry(),), run=Cluster(None))
    assert (only(found).state, only(found).record) == (JobState.DONE, Path("/results/job7.json"))
    assert found.problems == ()


def test_a_record_from_before_the_submission_is_another_jobs(tmp_path: Path) -> None:
    submit(tmp_path)
    old = entry(started_at="2025-01-01T07:00:00+00:00")
    jobs = all_jobs(tmp_path, (old,), run=Cluster("7|RUNNING|None|0|0|"))
    assert [(job.id, job.state) for job in jobs.reports] == [("7", JobState.RUNNING), ("7", JobState.DONE)]


@pytest.mark.parametrize(
    ("log", "state", "reason"),
    [
        (None, JobState.UNKNOWN, "Slurm no longer knows it, and there is no log"),
        ("step 3\n", JobState.UNKNOWN, "Slurm no longer knows it; its log ends with: step 3"),
        (TORCH_OOM, JobState.OUT_OF_MEMORY, TORCH_OOM),
    ],
)
def test_a_job_that_slurm_has_forgotten_is_known_by_its_log(
    tmp_path: Path, log: str | None, state: JobState, reason: str
) -> None:
    submit(tmp_path, log=log)
    found = all_jobs(tmp_path, (), run=Cluster())
    assert (only(found).state, only(found).reason) == (state, reason)
    assert found.problems == ("sacct: not installed here",)


def test_accounting_knows_what_the_controller_has_forgotten(tmp_path: Path) -> None:
    submit(tmp_path)
    found = all_jobs(tmp_path, (), run=Cluster(accounts="7|TIMEOUT|0:15\n7.batch|CANCELLED|0:15\n"))
    assert only(found).state is JobState.TIMED_OUT
    assert found.problems == ()


def test_a_job_of_another_cluster_is_not_taken_for_one_of_the_same_number(tmp_path: Path) -> None:
    submit(tmp_path, cluster="selene")
    report = only(all_jobs(tmp_path, (), run=Cluster("7|RUNNING|None|0|0|")))
    assert report.state is JobState.UNKNOWN
    assert report.reason == "cluster selene is not reached from here, and there is no log"


def test_runs_without_a_scheduler_are_jobs_too(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError), noted(tmp_path, smoke(), repeat=0, command=("moe-bench",), env={}):
        raise MeasurementError("the loss is not finite")
    with noted(tmp_path, smoke(), repeat=1, command=("moe-bench",), env={}):
        jobs = all_jobs(tmp_path, (entry("pid7"), entry("job99")), run=Cluster())
    assert {(job.repeat, job.state.value, job.reason) for job in jobs.reports if job.record is None} == {
        (0, "failed", "exit code 1: the loss is not finite"),
        (1, "running", ""),
    }
    assert [job.id for job in jobs.reports if job.state is JobState.DONE] == ["pid7", "99"]


def test_the_newest_job_comes_first(tmp_path: Path) -> None:
    submit(tmp_path)
    jobs = all_jobs(tmp_path, (entry("pid1"), entry("pid2", "2026-11-22T05:00:00+00:00")), run=Cluster())
    assert [job.id for job in jobs.reports] == ["pid1", "7", "pid2"]
