"""Measurements of a calibration as they come in: a line each, so that a run that was killed can go on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from moe_bench.errors import BadInputError
from moe_bench.results.calibration import (
    Calibration,
    CalibrationProvenance,
    Measurement,
    Task,
    Unmeasured,
)
from moe_bench.results.store import CALIBRATION_FOLDER
from moe_bench.spec.base import Spec

UNFINISHED = ".unfinished"

Entry = Measurement | Unmeasured
_ENTRIES: TypeAdapter[Entry] = TypeAdapter(Entry)


class Header(Spec):
    """First line of a journal: everything of the file to be that is known before the first measurement."""

    journal_version: Literal[1] = 1
    is_tiny: bool
    provenance: CalibrationProvenance


@dataclass(slots=True)
class Journal:
    """An unfinished calibration on disk."""

    path: Path
    header: Header
    entries: list[Entry] = field(default_factory=list)

    @property
    def done(self) -> frozenset[Task]:
        """Tasks that have an entry, measured or not."""
        return frozenset(_task(entry) for entry in self.entries)

    def append(self, entry: Entry) -> None:
        """Write one more, in one call, and wait until it is on disk."""
        _append(self.path, entry.model_dump_json())
        self.entries.append(entry)

    def finish(self, *, end_sm_clock_hz: float | None) -> Path:
        """Write the calibration file beside the journal, and drop the journal.

        Raises BadInputError where nothing was measured.
        """
        measurements = tuple(one for one in self.entries if isinstance(one, Measurement))
        if not measurements:
            raise BadInputError(f"{self.path}: no measurement in it; choose operations that run here")
        provenance = self.header.provenance.model_copy(update={"end_sm_clock_hz": end_sm_clock_hz})
        calibration = Calibration(
            is_tiny=self.header.is_tiny,
            provenance=provenance,
            measurements=measurements,
            unmeasured=tuple(one for one in self.entries if isinstance(one, Unmeasured)),
        )
        path = self.path.with_name(self.path.name.removeprefix(".").removesuffix(UNFINISHED) + ".json")
        with path.open("x", encoding="utf-8") as file:
            file.write(calibration.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.path.unlink()
        return path


def gpu_folder(root: Path, gpu_name: str) -> Path:
    """`<root>/calibration/<gpu>`, the name in lower case with `_` between its words."""
    return root / CALIBRATION_FOLDER / re.sub(r"[^a-z0-9]+", "_", gpu_name.lower()).strip("_")


def start_journal(root: Path, provenance: CalibrationProvenance, *, is_tiny: bool) -> Journal:
    """A new journal, `.<start>-<commit>-<job>.unfinished` in the folder of its GPU."""
    folder = gpu_folder(root, provenance.gpu.name)
    folder.mkdir(parents=True, exist_ok=True)
    started = re.sub(r"[-:]", "", provenance.started_at).split("+")[0].split(".")[0]
    name = f".{started}Z-{provenance.git.short_name}-{provenance.job_id}{UNFINISHED}"
    header = Header(is_tiny=is_tiny, provenance=provenance)
    path = folder / name
    path.touch(exist_ok=False)
    _append(path, header.model_dump_json())
    return Journal(path, header)


def unfinished_journals(root: Path, gpu_name: str) -> tuple[Path, ...]:
    """Journals of this GPU that no calibration file came of, oldest first."""
    return tuple(sorted(gpu_folder(root, gpu_name).glob(f".*{UNFINISHED}")))


def resume_journal(path: Path, here: CalibrationProvenance, *, is_tiny: bool) -> Journal:
    """The journal in `path`, to be gone on with by a process whose provenance would be `here`.

    What a kill cut off in the middle of a line is dropped. Raises BadInputError where the rest would be
    measured with other software, or on another GPU, than what stands there.
    """
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n")
    try:
        header = Header.model_validate_json(lines[0])
        entries = [_ENTRIES.validate_json(line) for line in lines[1:]]
    except ValidationError as error:
        raise BadInputError(f"{path}: not a journal of calibrate; remove it and start afresh") from error
    if torn:
        os.truncate(path, len(whole) + 1)
    _require_alike(path, header, here, is_tiny=is_tiny)
    return Journal(path, header, entries)


def _require_alike(path: Path, header: Header, here: CalibrationProvenance, *, is_tiny: bool) -> None:
    then = header.provenance
    pairs: Iterable[tuple[str, object, object]] = (
        ("--tiny", header.is_tiny, is_tiny),
        ("GPU", then.gpu.name, here.gpu.name),
        ("driver", then.gpu.driver_version, here.gpu.driver_version),
        ("commit", then.git.short_name, here.git.short_name),
        ("packages", then.packages, here.packages),
    )
    for name, before, now in pairs:
        if before != now:
            raise BadInputError(
                f"{path}: {name}: {before} when it was begun, {now} now; one file holds one state: "
                "remove it, or start afresh without --resume"
            )


def _task(entry: Entry) -> Task:
    return Task(what=entry.what, dtype=entry.dtype, implementation=entry.implementation)


def _append(path: Path, line: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, line.encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
