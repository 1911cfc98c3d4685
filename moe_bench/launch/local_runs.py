"""Runs without a scheduler: a note while one lasts, which stays behind where it leaves no record."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from pydantic import ValidationError

from moe_bench.errors import BadInputError, MoeBenchError
from moe_bench.spec.base import NonNegativeInt, PositiveInt, Spec, Text
from moe_bench.spec.scale import Plan

_CANCELLED = 128 + signal.SIGTERM
FOLDER = ".runs"
"""Folder of the notes below the results' root."""


class LocalRun(Spec):
    """One run that no scheduler knows of."""

    process_id: PositiveInt
    host: Text
    started_at: Text
    """UTC, ISO 8601."""
    process_start_ticks: NonNegativeInt
    """When the process began (proc(5), starttime): numbers of processes are given out again."""
    plan: Plan
    repeat: NonNegativeInt
    command: tuple[str, ...]
    exit_code: NonNegativeInt | None = None
    """None while it runs, and for ever where it was killed."""
    error: str | None = None

    @property
    def record_job_id(self) -> str:
        """What the record of this run calls it (`Provenance.job_id`)."""
        return f"pid{self.process_id}"

    @property
    def is_cancelled(self) -> bool:
        """Whether `jobs cancel` has ended it."""
        return self.exit_code == _CANCELLED

    @property
    def is_running(self) -> bool | None:
        """Whether the process is still there; None where it is another machine's."""
        if self.exit_code is not None:
            return False
        if self.host != socket.gethostname():
            return None
        return _start_ticks(self.process_id) == self.process_start_ticks


@contextmanager
def noted(
    root: Path, plan: Plan, *, repeat: int, command: tuple[str, ...], env: Mapping[str, str]
) -> Iterator[None]:
    """Leave a note below `root` while the block runs, and afterwards only where it ended with a named error.

    A run inside a Slurm job (`env`) needs none: Slurm and the ledger know it.
    """
    if "SLURM_JOB_ID" in env:
        yield
        return
    run = LocalRun(
        process_id=os.getpid(),
        host=socket.gethostname(),
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        process_start_ticks=_start_ticks(os.getpid()) or 0,
        plan=plan,
        repeat=repeat,
        command=command,
    )
    path = _path(root, run)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run.model_dump_json(), encoding="utf-8")
    try:
        yield
    except MoeBenchError as error:
        _end(root, run, exit_code=error.exit_code, error=str(error))
        raise
    path.unlink()


def cancel_local(root: Path, process_id: int) -> None:
    """End the run of that process on this machine. Raises BadInputError where it has ended meanwhile."""
    for run in read_local_runs(root):
        if run.process_id == process_id and run.is_running:
            with suppress(ProcessLookupError):  # it ends at this very moment
                os.kill(process_id, signal.SIGTERM)
                _end(root, run, exit_code=_CANCELLED, error=None)
                return
    raise BadInputError(f"job pid{process_id} has ended meanwhile: there is nothing to cancel")


def _end(root: Path, run: LocalRun, *, exit_code: int, error: str | None) -> None:
    ended = run.model_copy(update={"exit_code": exit_code, "error": error})
    _path(root, run).write_text(ended.model_dump_json(), encoding="utf-8")


def _path(root: Path, run: LocalRun) -> Path:
    return root / FOLDER / f"{run.host}-{run.record_job_id}-{run.process_start_ticks}-{run.repeat}.json"


def read_local_runs(root: Path) -> tuple[LocalRun, ...]:
    """The notes below `root`; one that cannot be read is being written and is passed over."""
    found = []
    for path in sorted((root / FOLDER).glob("*.json")):
        try:
            found.append(LocalRun.model_validate_json(path.read_bytes()))
        except (ValidationError, FileNotFoundError):
            continue
    return tuple(found)


def _start_ticks(process_id: int) -> int | None:
    """Field 22 of /proc/<pid>/stat; None where there is no such process, or no /proc."""
    try:
        text = Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8")
    except OSError:
        return None
    # the second field is the name in brackets and may hold anything
    return int(text.rpartition(")")[2].split()[19])
