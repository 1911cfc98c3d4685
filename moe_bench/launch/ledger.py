"""What was submitted: a line per job beside the records, so that a run that left none is still known."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from moe_bench.errors import BadInputError
from moe_bench.spec.base import NonNegativeInt, PositiveInt, Spec, Text
from moe_bench.spec.scale import Plan

LEDGER = ".submitted.jsonl"
"""File below the results' root; lines are only ever added."""


class SubmittedJob(Spec):
    """A job as it was handed to the scheduler."""

    job_id: PositiveInt
    cluster: str | None
    """`ClusterName` of the Slurm that took it; numbers repeat between clusters."""
    submitted_at: Text
    """UTC, ISO 8601."""
    plan: Plan
    repeat: NonNegativeInt
    job_size: Text
    time_limit_s: PositiveInt
    log: Text
    """The file that the job's output goes to."""
    command: tuple[Text, ...]

    @property
    def record_job_id(self) -> str:
        """What the record of this job calls it (`Provenance.job_id`)."""
        return f"job{self.job_id}"


def add_to_ledger(root: Path, job: SubmittedJob) -> None:
    """Write `job` behind the others; two submitters at once wait for each other."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / LEDGER).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(job.model_dump_json().encode() + b"\n")


def read_ledger(root: Path) -> Iterator[SubmittedJob]:
    """Every job that was submitted, in that order; none where nothing was.

    Raises BadInputError with the line that cannot be read.
    """
    path = root / LEDGER
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield SubmittedJob.model_validate_json(line)
            except ValidationError as error:
                first = error.errors()[0]
                place = ".".join(map(str, first["loc"]))
                raise BadInputError(f"{path}:{number}: {place}: {first['msg']}; remove the line") from error
