"""Measurements of a calibration as they come in: a line each, so that a run that was killed can go on."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from moe_bench.errors import BadInputError
from moe_bench.results import journal
from moe_bench.results.calibration import (
    Calibration,
    CalibrationProvenance,
    Measurement,
    Task,
    Unmeasured,
)
from moe_bench.results.journal import LineJournal, begin_journal, file_stem, read_journal, require_alike
from moe_bench.results.store import CALIBRATION_FOLDER
from moe_bench.spec.base import Spec

Entry = Measurement | Unmeasured
_ENTRIES: TypeAdapter[Entry] = TypeAdapter(Entry)


class Header(Spec):
    """First line of a journal: everything of the file to be that is known before the first measurement."""

    journal_version: Literal[1] = 1
    is_tiny: bool
    provenance: CalibrationProvenance


class Journal(LineJournal[Header, Entry]):
    """An unfinished calibration on disk."""

    @property
    def done(self) -> frozenset[Task]:
        """Tasks that have an entry, measured or not."""
        return frozenset(_task(entry) for entry in self.entries)

    def finish(self, *, end_sm_clock_hz: float | None) -> Path:
        """Write the calibration file beside the journal, and drop the journal.

        Raises BadInputError where nothing was measured.
        """
        measurements = tuple(one for one in self.entries if isinstance(one, Measurement))
        if not measurements:
            raise BadInputError(f"{self.path}: no measurement in it; choose operations that run here")
        calibration = Calibration(
            is_tiny=self.header.is_tiny,
            provenance=self.header.provenance.model_copy(update={"end_sm_clock_hz": end_sm_clock_hz}),
            measurements=measurements,
            unmeasured=tuple(one for one in self.entries if isinstance(one, Unmeasured)),
        )
        return self.close_into(calibration)


def gpu_folder(root: Path, gpu_name: str) -> Path:
    """`<root>/calibration/<gpu>`."""
    return journal.gpu_folder(root, CALIBRATION_FOLDER, gpu_name)


def start_journal(root: Path, provenance: CalibrationProvenance, *, is_tiny: bool) -> Journal:
    """A new journal, `.<start>-<commit>-<job>.unfinished` in the folder of its GPU."""
    stem = file_stem(
        started_at=provenance.started_at, commit=provenance.git.short_name, job_id=provenance.job_id
    )
    header = Header(is_tiny=is_tiny, provenance=provenance)
    return Journal(begin_journal(gpu_folder(root, provenance.gpu.name), stem, header), header)


def unfinished_journals(root: Path, gpu_name: str) -> tuple[Path, ...]:
    """Journals of this GPU that no calibration file came of, oldest first."""
    return journal.unfinished_journals(gpu_folder(root, gpu_name))


def resume_journal(path: Path, here: CalibrationProvenance, *, is_tiny: bool) -> Journal:
    """The journal in `path`, to be gone on with by a process whose provenance would be `here`.

    What a kill cut off in the middle of a line is dropped. Raises BadInputError where the rest would be
    measured with other software, or on another GPU, than what stands there.
    """
    header, entries = read_journal(path, Header, _ENTRIES, command="calibrate")
    then = header.provenance
    require_alike(
        path,
        (
            ("--tiny", header.is_tiny, is_tiny),
            ("GPU", then.gpu.name, here.gpu.name),
            ("driver", then.gpu.driver_version, here.gpu.driver_version),
            ("commit", then.git.short_name, here.git.short_name),
            ("packages", then.packages, here.packages),
        ),
    )
    return Journal(path, header, entries)


def _task(entry: Entry) -> Task:
    return Task(what=entry.what, dtype=entry.dtype, implementation=entry.implementation)
