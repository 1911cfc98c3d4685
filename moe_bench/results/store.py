"""Records on disk: written once, named by start, commit and job, never changed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from moe_bench.errors import BadInputError
from moe_bench.results.record import SCHEMA_VERSION, Record
from moe_bench.spec.scale import Plan

CALIBRATION_FOLDER = "calibration"
"""Folder beside the models' that holds measurements of single operations (results/calibration.py)."""


class RecordError(BadInputError):
    """A result file that cannot be read, or that would be overwritten."""


def record_folder(root: Path, plan: Plan) -> Path:
    """Where the records of `plan` lie: `<root>/<model>/<recipe>[_<scale>]`."""
    return root / (plan.asked if plan.scale == "full" else f"{plan.asked}_{plan.scale}")


def record_path(root: Path, record: Record) -> Path:
    """`<root>/<model>/<recipe>[_<scale>]/<start>-<commit>-<job>[-r<repeat>].json`."""
    provenance = record.provenance
    started = provenance.started_at.replace("-", "").replace(":", "").split(".")[0].split("+")[0]
    commit = (provenance.git.commit or "nocommit")[:8] + ("-dirty" if provenance.git.is_dirty else "")
    repeat = f"-r{provenance.repeat}" if provenance.repeat else ""
    return record_folder(root, record.plan) / f"{started}Z-{commit}-{provenance.job_id}{repeat}.json"


def write_record(root: Path, record: Record) -> Path:
    """Write `record` to its own new file and return the path; RecordError if the file is there already."""
    path = record_path(root, record)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(record.model_dump_json(indent=1) + "\n")
    except FileExistsError as error:
        raise RecordError(f"{path} exists; results are never overwritten; give the job another id") from error
    return path


def read_record(path: Path) -> Record:
    """The record in `path`; RecordError names the file and what is wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
        version = json.loads(text).get("schema_version")
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise RecordError(f"{path}: not a result file ({error}); remove it or name another") from error
    if version != SCHEMA_VERSION:
        raise RecordError(
            f"{path}: schema version {version}, {SCHEMA_VERSION} is read here; use the release that wrote it"
        )
    try:
        return Record.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(element) for element in first["loc"])
        raise RecordError(f"{path}: {place}: {first['msg']}; the file was changed or cut short") from error


def read_records(places: tuple[Path, ...]) -> Iterator[Record]:
    """The records in files and below folders, in the order of their paths; calibrations are passed over."""
    for place in places:
        paths = sorted(place.rglob("*.json")) if place.is_dir() else [place]
        for path in paths:
            if CALIBRATION_FOLDER not in path.relative_to(place).parts:
                yield read_record(path)
