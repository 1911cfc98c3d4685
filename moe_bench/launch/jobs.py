"""Every job that was started for these results and what became of it, from Slurm, records and logs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import EXIT_CODES
from moe_bench.launch.job_log import LogEnd, log_end
from moe_bench.launch.job_state import JobState
from moe_bench.launch.ledger import SubmittedJob, read_ledger
from moe_bench.launch.local_runs import LocalRun, read_local_runs
from moe_bench.launch.runner import Runner
from moe_bench.launch.slurm_state import SlurmJob, accounted_jobs, remembered_jobs
from moe_bench.launch.submit import cluster_name
from moe_bench.results.entry import Entry
from moe_bench.spec.scale import Plan

NO_LONGER_KNOWN = "Slurm no longer knows it"


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """One job and where it stands."""

    id: str
    """The scheduler's number, or `pid<number>` of a run without one."""
    recipe: str
    """As asked."""
    scale: str
    modified: tuple[str, ...]
    num_ranks: int
    repeat: int
    started_at: str
    """When it was submitted or, without a scheduler, started; UTC."""
    state: JobState
    reason: str
    """What says so, or what to know about it; empty where there is nothing to add."""
    record: Path | None
    log: Path | None
    job_size: str = ""
    command: tuple[str, ...] = ()
    process_id: int | None = None
    """Of a run without a scheduler that has not ended."""
    plan: Plan | None = None
    """None where only the record knows it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """All of them, newest first."""

    reports: tuple[JobReport, ...]
    problems: tuple[str, ...]
    """Which of Slurm's commands could not answer, where a job's state hangs on it."""


def all_jobs(root: Path, entries: Iterable[Entry], *, run: Runner) -> Jobs:
    """The jobs of the ledger and the local runs below `root`, whose records are `entries`."""
    records = _by_job(entries)
    submitted = [(job, _record(job, records)) for job in read_ledger(root)]
    # another cluster gives the same numbers to other jobs, and a record says enough
    cluster = cluster_name(run) if submitted else None
    slurm, problems = _slurm_jobs(
        {job.job_id for job, record in submitted if record is None and job.cluster == cluster}, run
    )
    reports = []
    for job, record in submitted:
        told = slurm.get(job.job_id) if job.cluster == cluster else None
        silent = (
            NO_LONGER_KNOWN if job.cluster == cluster else f"cluster {job.cluster} is not reached from here"
        )
        reports.append(_submitted(job, told, record, silent=silent))
    reports += [_local(local) for local in read_local_runs(root)]
    of_submitted = {record.path for _, record in submitted if record is not None}
    reports += [
        _recorded(entry) for found in records.values() for entry in found if entry.path not in of_submitted
    ]
    return Jobs(
        reports=tuple(sorted(reports, key=lambda report: report.started_at, reverse=True)), problems=problems
    )


def _by_job(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        found.setdefault(entry.job_id, []).append(entry)
    return found


def _record(job: SubmittedJob, records: Mapping[str, list[Entry]]) -> Entry | None:
    """The record that `job` wrote; numbers begin anew when a cluster is set up again, so not an older one."""
    found = [entry for entry in records.get(job.record_job_id, ()) if entry.started_at >= job.submitted_at]
    return found[-1] if found else None


def _slurm_jobs(numbers: AbstractSet[int], run: Runner) -> tuple[dict[int, SlurmJob], tuple[str, ...]]:
    """Slurm's words on the jobs `numbers`, and which of its commands could not tell of some."""
    if not numbers:
        return {}, ()
    remembered = remembered_jobs(run)
    forgotten = numbers - remembered.jobs.keys()
    accounted = accounted_jobs(forgotten, run)
    is_open = bool(forgotten - accounted.jobs.keys())
    problems = tuple(one.problem for one in (remembered, accounted) if one.problem is not None and is_open)
    return remembered.jobs | accounted.jobs, problems


def _submitted(job: SubmittedJob, slurm: SlurmJob | None, record: Entry | None, *, silent: str) -> JobReport:
    """What became of `job`; `silent` says why Slurm does not tell, where it does not."""
    log = Path(job.log)
    if record is not None:
        state, reason = JobState.DONE, ""
    elif slurm is None:
        state, reason = _from_log(log_end(log), silent)
    else:
        state, reason = _from_slurm(slurm, log)
    plan = job.plan
    return JobReport(
        id=str(job.job_id),
        recipe=plan.asked,
        scale=plan.scale,
        modified=plan.modified,
        num_ranks=plan.num_ranks,
        repeat=job.repeat,
        started_at=job.submitted_at,
        state=state,
        reason=reason,
        record=None if record is None else record.path,
        log=log if log.is_file() else None,
        job_size=job.job_size,
        command=job.command,
        plan=plan,
    )


def _from_slurm(slurm: SlurmJob, log: Path) -> tuple[JobState, str]:
    """State and reason of a job without a record. Slurm sees that a rank failed, the log sees why."""
    state = slurm.meaning
    if state is JobState.FAILED:
        end = log_end(log)
        if end is not None and end.state is JobState.OUT_OF_MEMORY:
            return end.state, end.line
        return state, _failure(slurm, end)
    if state is JobState.DONE:
        return state, "it left no record below these results"
    if state is JobState.UNKNOWN:
        return state, f"Slurm calls it {slurm.state}"
    lives = "" if not slurm.num_restarts else f"life {slurm.num_restarts + 1}"
    return state, ", ".join(text for text in (slurm.reason, lives) if text)


def _failure(slurm: SlurmJob, end: LogEnd | None) -> str:
    if slurm.state != "FAILED":
        return slurm.state
    if slurm.signal:
        return f"killed by signal {slurm.signal}"
    meaning = dict(EXIT_CODES).get(slurm.exit_code, "not one of ours")
    last = f": {end.line}" if end is not None and end.line else ""
    return f"exit code {slurm.exit_code}, {meaning}{last}"


def _from_log(end: LogEnd | None, silent: str) -> tuple[JobState, str]:
    """The same where only the log is left."""
    if end is None:
        return JobState.UNKNOWN, f"{silent}, and there is no log"
    if end.state is None:
        return JobState.UNKNOWN, f"{silent}; its log ends with: {end.line}"
    return end.state, end.line


def _local(local: LocalRun) -> JobReport:
    if local.is_cancelled:
        state, reason = JobState.CANCELLED, ""
    elif local.exit_code is not None:
        state, reason = JobState.FAILED, f"exit code {local.exit_code}: {local.error}"
    elif local.is_running is None:
        state, reason = JobState.UNKNOWN, f"it runs or ran on {local.host}"
    elif local.is_running:
        state, reason = JobState.RUNNING, ""
    else:
        state, reason = JobState.FAILED, "the process is gone and left no record"
    plan = local.plan
    return JobReport(
        id=local.record_job_id,
        recipe=plan.asked,
        scale=plan.scale,
        modified=plan.modified,
        num_ranks=plan.num_ranks,
        repeat=local.repeat,
        started_at=local.started_at,
        state=state,
        reason=reason,
        record=None,
        log=None,
        job_size=f"on {local.host}",
        command=local.command,
        process_id=local.process_id if state is JobState.RUNNING else None,
        plan=plan,
    )


def _recorded(entry: Entry) -> JobReport:
    """A run that nobody submitted with `submit`: here, or in a job that was asked for by hand."""
    return JobReport(
        id=entry.job_id.removeprefix("job"),
        recipe=entry.recipe,
        scale=entry.scale,
        modified=entry.modified,
        num_ranks=entry.num_ranks,
        repeat=entry.repeat,
        started_at=entry.started_at,
        state=JobState.DONE,
        reason="",
        record=entry.path,
        log=None,
    )
