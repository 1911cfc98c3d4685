"""Records on disk: written once, named by start, commit and job, never changed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from moe_bench.results.record import SCHEMA_VERSION, Record
from moe_bench.results.versioned import parse_versioned, read_versioned
from moe_bench.spec.base import Spec
from moe_bench.spec.scale import Plan

CALIBRATION_FOLDER = "calibration"
"""Folder beside the models' that holds measurements of single operations (results/calibration.py)."""
LAYER_FOLDER = "layer"
"""The same of single MoE layers (results/layer_record.py)."""
CAMPAIGN_FOLDER = "campaigns"
"""Holds what came of lists of measurements (results/campaign.py)."""
VERIFY_FOLDER = "verify"
"""The same of proofs that models are Hugging Face's (results/verification.py)."""
PARITY_FOLDER = "parity"
"""The same of evidence that two settings of a recipe learn alike (results/parity.py)."""
NOT_RUNS = frozenset({PARITY_FOLDER, CALIBRATION_FOLDER, LAYER_FOLDER, CAMPAIGN_FOLDER, VERIFY_FOLDER})
"""Folders beside the models' whose files are no records of runs."""
WHAT = "result file"


def record_folder(root: Path, plan: Plan) -> Path:
    """Where the records of `plan` lie: `<root>/<model>/<recipe>[_<scale>]`."""
    return root / (plan.asked if plan.scale == "full" else f"{plan.asked}_{plan.scale}")


def record_path(root: Path, record: Record) -> Path:
    """`<root>/<model>/<recipe>[_<scale>]/<start>-<commit>-<job>[-r<repeat>].json`."""
    provenance = record.provenance
    started = provenance.started_at.replace("-", "").replace(":", "").split(".")[0].split("+")[0]
    repeat = f"-r{provenance.repeat}" if provenance.repeat else ""
    name = f"{started}Z-{provenance.git.short_name}-{provenance.job_id}{repeat}.json"
    return record_folder(root, record.plan) / name


def write_record(root: Path, record: Record) -> Path:
    """Write `record` to a new file of its own and return the path.

    A second record of the same name, as two machines make with equal process ids, gets a number behind it:
    what was measured is neither overwritten nor dropped. The name is taken first and filled in one step, so
    whoever reads meanwhile sees an empty file or the whole record.
    """
    return write_once(record_path(root, record), record)


def write_once(path: Path, content: Spec) -> Path:
    """Write `content` as one line of JSON to `path`, or beside it where the name is taken; the path.

    The name is taken first and filled in one step, as `write_record` says.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path = _taken(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    with unfinished.open("xb") as file:
        file.write(content.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    unfinished.replace(path)
    return path


def _taken(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that nobody has; an empty file keeps the name."""
    number, free = 1, path
    while True:
        try:
            free.open("x").close()
        except FileExistsError:
            number += 1
            free = path.with_stem(f"{path.stem}-{number}")
        else:
            return free


def read_record(path: Path) -> Record:
    """The record in `path`; RecordError names the file and what is wrong with it."""
    return read_versioned(path, Record, what=WHAT, version=SCHEMA_VERSION)


def parse_record(text: bytes, path: Path) -> Record:
    """The record in `text`, which was read from `path`; RecordError as above."""
    return parse_versioned(text, Record, path=path, what=WHAT, version=SCHEMA_VERSION)


def record_files(place: str) -> Iterator[os.DirEntry[str]]:
    """The JSON files below the folder `place`, in no order.

    What lies in NOT_RUNS is passed over, and what begins with a dot: the index, submitted jobs, unfinished
    records.
    """
    with os.scandir(place) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                if entry.name not in NOT_RUNS:
                    with suppress(FileNotFoundError):  # removed since the folder above was read
                        yield from record_files(entry.path)
            elif entry.name.endswith(".json"):
                yield entry


def read_records(places: tuple[Path, ...]) -> Iterator[Record]:
    """The records in files and below folders, in the order of their paths."""
    for place in places:
        paths = [Path(entry.path) for entry in record_files(str(place))] if place.is_dir() else [place]
        for path in sorted(paths):
            yield read_record(path)
