"""The closed form of memory held against the record: runs that ran, printed peaks, and runs that failed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moe_bench.analysis.memory import GIB
from moe_bench.analysis.memory_verdict import MemoryVerdict
from moe_bench.errors import BadInputError
from moe_bench.projection.rows.inference import (
    Catalogue,
    Configured,
    InferredRun,
    NotProjectable,
    configured,
    infer,
)
from moe_bench.projection.rows.memory import RunMemory, run_memory
from moe_bench.projection.rows.recompute import with_recompute
from moe_bench.projection.rows.stack import Engine, Suite
from moe_bench.results.published import PublishedRow, published_rows
from moe_bench.spec.base import PositiveInt, Spec, Text
from moe_bench.spec.load import validated
from moe_bench.spec.yaml_tree import read_yaml

TOLERANCE_FRACTION = 0.1
"""A printed peak is met where the closed form is no farther from it."""


class Correction(Spec):
    """Rows that ran otherwise than they are recorded."""

    rows: tuple[Text, ...]
    ran: Mapping[str, PositiveInt] | None = None
    """Columns that differ; None where the row says nothing of training memory."""
    shown_by: Literal["memory", "code"] = "memory"
    """Whether the recorded columns do not fit the GPU, or only the code of the release contradicts them."""
    cause: Text
    source: Text


class _CorrectionFile(Spec):
    known: tuple[Correction, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What the record holds beside the published rows, by the folder `results/published/known`."""

    corrections: tuple[Correction, ...]
    failed: tuple[PublishedRow, ...]
    """Runs that are known to have run out of memory."""


def load_evidence(folder: Path) -> Evidence:
    """`memory.yaml` and `out_of_memory.yaml` of `folder`; RecipeError names every mistake in them."""
    corrections, failed = folder / "memory.yaml", folder / "out_of_memory.yaml"
    return Evidence(
        corrections=validated(read_yaml(corrections, shown_as=corrections.name), _CorrectionFile).known,
        failed=published_rows(read_yaml(failed, shown_as=failed.name)),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class JudgedRow:
    """One run and what the closed form says of it."""

    run: InferredRun | Configured
    memory: RunMemory
    correction: Correction | None = None
    """Why the run is judged as it ran, not as it is recorded."""

    @property
    def verdict(self) -> MemoryVerdict:
        """Whether it fits its GPU."""
        return self.memory.verdict

    @property
    def printed_bytes(self) -> int | None:
        """The printed peak, in the unit that its source means."""
        printed = self.run.row.metrics.peak_mem_gb
        return None if printed is None else round(printed * _unit_bytes(self.run))

    @property
    def is_reserved(self) -> bool:
        """Whether the printed peak is the allocator's reserved memory, as torchtitan prints it."""
        return self.run.stack.engine is Engine.TORCHTITAN

    @property
    def projected_bytes(self) -> int:
        """What the printed peak is held against: reserved or allocated memory."""
        return self.memory.reserved_bytes if self.is_reserved else self.memory.held_bytes

    @property
    def peak_error(self) -> float | None:
        """Projected over printed, less one; None without a printed peak."""
        return None if self.printed_bytes is None else self.projected_bytes / self.printed_bytes - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRecord:
    """Both sides of the record."""

    ran: tuple[JudgedRow, ...]
    """Published training runs, those that are scored nowhere else included."""
    silent: tuple[Correction, ...]
    """Rows that were left out because they say nothing of training memory."""
    failed: tuple[JudgedRow, ...]
    unjudged: tuple[NotProjectable, ...]
    """Failed runs that cannot be judged, and why."""

    @property
    def counts(self) -> Counter[MemoryVerdict]:
        """Verdicts on the runs that ran."""
        return Counter(row.verdict for row in self.ran)

    @property
    def impossible(self) -> tuple[JudgedRow, ...]:
        """Runs that ran, and are called not fitting."""
        return tuple(row for row in self.ran if row.verdict is MemoryVerdict.DOES_NOT_FIT)

    @property
    def missed(self) -> tuple[JudgedRow, ...]:
        """Runs that failed, and are called fitting."""
        return tuple(row for row in self.failed if row.verdict is MemoryVerdict.FITS)

    @property
    def too_close_fraction(self) -> float:
        """Share of verdicts on the runs that ran; 0 without any."""
        return self.counts[MemoryVerdict.TOO_CLOSE] / max(1, len(self.ran))

    @property
    def peaks(self) -> tuple[JudgedRow, ...]:
        """Runs with a printed peak."""
        return tuple(row for row in self.ran if row.peak_error is not None)

    @property
    def num_peaks_met(self) -> int:
        """Printed peaks within `TOLERANCE_FRACTION`."""
        return sum(abs(row.peak_error or 0.0) <= TOLERANCE_FRACTION for row in self.peaks)


def as_they_ran(rows: Iterable[PublishedRow], evidence: Evidence) -> tuple[PublishedRow, ...]:
    """`rows` with the columns of `evidence` in the place of those that their source has wrong."""
    by_row = {row_id: correction for correction in evidence.corrections for row_id in correction.rows}
    return tuple(_as_it_ran(row, by_row.get(row.id)) for row in rows)


def memory_record(rows: Iterable[PublishedRow], evidence: Evidence, catalogue: Catalogue) -> MemoryRecord:
    """Every training row of `rows` that can be configured, and every failed run, judged.

    Rows without throughput count where they print a peak. A recipe that the closed form refuses is left out.
    """
    by_row = {row_id: correction for correction in evidence.corrections for row_id in correction.rows}
    ran = []
    for row in rows:
        correction = by_row.get(row.id)
        if not row.is_training or (correction is not None and correction.ran is None):
            continue
        run = _configured_run(_as_it_ran(row, correction), catalogue)
        judged = None if isinstance(run, NotProjectable) else _judged(run, correction)
        if judged is not None:
            ran.append(judged)
    failed, unjudged = [], []
    for row in evidence.failed:
        made = configured(row, catalogue)
        if isinstance(made, NotProjectable):
            unjudged.append(made)
        else:
            failed.append(JudgedRow(run=made, memory=run_memory(made)))
    return MemoryRecord(
        ran=tuple(ran),
        silent=tuple(one for one in evidence.corrections if one.ran is None),
        failed=tuple(failed),
        unjudged=tuple(unjudged),
    )


def _unit_bytes(run: InferredRun | Configured) -> int:
    """2^30, whatever torchtitan and Automodel call it (Automodel's recipes/llm/benchmark.py); Megatron-Bridge
    divides by 10^9 (training/utils/train_utils.py, report_memory) where its notes do not say GiB.
    """
    is_decimal = run.stack.suite is Suite.BRIDGE and "GiB" not in (run.row.note or "")
    return 10**9 if is_decimal else GIB


def _as_it_ran(row: PublishedRow, correction: Correction | None) -> PublishedRow:
    if correction is None or correction.ran is None:
        return row
    return row.model_copy(update=dict(correction.ran))


def _configured_run(row: PublishedRow, catalogue: Catalogue) -> InferredRun | Configured | NotProjectable:
    run = infer(row, catalogue)
    if isinstance(run, InferredRun):
        return with_recompute(run)
    return configured(row, catalogue) if row.metrics.peak_mem_gb is not None else run


def _judged(run: InferredRun | Configured, correction: Correction | None) -> JudgedRow | None:
    try:
        memory = run_memory(run)
    except BadInputError:
        return None
    return JudgedRow(run=run, memory=memory, correction=correction)
