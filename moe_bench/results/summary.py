"""One run without the samples of its ranks and experts: what tables, comparisons and verdicts need of it."""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from moe_bench.results.facts import Facts, facts_of, software_of
from moe_bench.results.metrics import RunMetrics, gpu_s_per_token, run_metrics
from moe_bench.results.record import Record
from moe_bench.results.store import WHAT, parse_record
from moe_bench.results.versioned import ForeignFileError, RecordError
from moe_bench.spec.scale import Plan


class Status(StrEnum):
    """Whether the numbers of a record are those of a steady state."""

    STEADY = "steady"
    DRIFTING = "drifting"
    SHORT = "short"
    """Too few steps to tell."""


_STATUS = {True: Status.STEADY, False: Status.DRIFTING, None: Status.SHORT}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """What is left of a record when the samples of its ranks and experts are reduced."""

    plan: Plan
    started_at: str
    """UTC, ISO 8601."""
    commit: str
    """Eight digits and, where the tree was changed, `-dirty`."""
    job_id: str
    repeat: int
    num_ranks: int
    metrics: RunMetrics
    gpu_s_per_token: tuple[float, ...]
    """Of each steady step, by the slowest rank."""
    facts: Facts
    software: Facts

    @property
    def status(self) -> Status:
        """Whether the steps have settled."""
        return _STATUS[self.metrics.has_settled]


type Run = Record | RunSummary
"""What readers of many runs take: they need no more than the summary."""


def summary_of(run: Run) -> RunSummary:
    """The summary of a record; a summary is its own."""
    if isinstance(run, RunSummary):
        return run
    provenance = run.provenance
    return RunSummary(
        plan=run.plan,
        started_at=provenance.started_at,
        commit=provenance.git.short_name,
        job_id=provenance.job_id,
        repeat=provenance.repeat,
        num_ranks=run.num_ranks,
        metrics=run_metrics(run),
        gpu_s_per_token=gpu_s_per_token(run),
        facts=facts_of(run),
        software=software_of(run),
    )


_LOADS = b'"tokens_per_expert":'
_AFTER_LOADS = b'"energy_j":'
"""Keys between which nine tenths of a record lie; inside a JSON string their quotes would be escaped."""


def read_summary(path: Path) -> RunSummary:
    """The summary of the record in `path`, without parsing its expert loads; RecordError as `read_record`.

    A 256-rank, 50-step record of 94 layers with 128 experts has 4.6 MB, 0.3 MB of it outside the loads.
    """
    try:
        text = _without_loads(path)
    except OSError as error:
        raise ForeignFileError(f"{path}: not a {WHAT} ({error.strerror}); name another") from error
    record = parse_record(text, path)
    try:
        return summary_of(record)
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise RecordError(f"{path}: its numbers contradict each other ({error}); remove it") from error


def _without_loads(path: Path) -> bytes:
    """The text of a record with the loads left out; all of it where they are not found."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:  # cannot be mapped
            return b""
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
            start, end = text.find(_LOADS), text.rfind(_AFTER_LOADS)
            return text[:start] + _LOADS + b"[]," + text[end:] if 0 <= start < end else text[:]
