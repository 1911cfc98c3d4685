"""A file of lines that a long measurement adds to as it goes, so that one that was killed can go on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from moe_bench.errors import BadInputError
from moe_bench.spec.base import Spec

UNFINISHED = ".unfinished"


@dataclass(slots=True)
class LineJournal[HeaderKind: Spec, EntryKind: Spec]:
    """An unfinished measurement on disk: a header, then a line for each entry."""

    path: Path
    header: HeaderKind
    entries: list[EntryKind] = field(default_factory=list)

    def append(self, entry: EntryKind) -> None:
        """Write one more, in one call, and wait until it is on disk."""
        _append(self.path, entry)
        self.entries.append(entry)

    def close_into(self, content: Spec) -> Path:
        """Write `content` beside the journal under the journal's name, drop the journal; the new path."""
        path = self.path.with_name(self.path.name.removeprefix(".").removesuffix(UNFINISHED) + ".json")
        with path.open("x", encoding="utf-8") as file:
            file.write(content.model_dump_json() + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.path.unlink()
        return path


def gpu_folder(root: Path, kind: str, gpu_name: str) -> Path:
    """`<root>/<kind>/<gpu>`, the GPU's name in lower case with `_` between its words."""
    return root / kind / re.sub(r"[^a-z0-9]+", "_", gpu_name.lower()).strip("_")


def file_stem(*, started_at: str, commit: str, job_id: str) -> str:
    """`<start>-<commit>-<job>` of a start in UTC, ISO 8601: the name that a measurement's files have."""
    started = re.sub(r"[-:]", "", started_at).split("+")[0].split(".")[0]
    return f"{started}Z-{commit}-{job_id}"


def begin_journal(folder: Path, stem: str, header: Spec) -> Path:
    """A new file `.<stem>.unfinished` in `folder`, with `header` as its first line."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".{stem}{UNFINISHED}"
    path.touch(exist_ok=False)
    _append(path, header)
    return path


def unfinished_journals(folder: Path) -> tuple[Path, ...]:
    """Journals in `folder` that no file came of, oldest first."""
    return tuple(sorted(folder.glob(f".*{UNFINISHED}")))


def read_journal[HeaderKind: Spec, EntryKind: Spec](
    path: Path, header_kind: type[HeaderKind], entry_kind: TypeAdapter[EntryKind], *, command: str
) -> tuple[HeaderKind, list[EntryKind]]:
    """Header and entries of the journal in `path`, which `command` wrote.

    What a kill cut off within a line is dropped from the file.

    Raises BadInputError where it is something else.
    """
    whole, _, torn = path.read_bytes().rpartition(b"\n")
    lines = whole.split(b"\n")
    try:
        header = header_kind.model_validate_json(lines[0])
        entries = [entry_kind.validate_json(line) for line in lines[1:]]
    except ValidationError as error:
        raise BadInputError(f"{path}: not a journal of {command}; remove it and start afresh") from error
    if torn:
        os.truncate(path, len(whole) + 1)
    return header, entries


def require_alike(
    path: Path,
    facts: Iterable[tuple[str, object, object]],
    *,
    remedy: str = "remove it, or start afresh without --resume",
) -> None:
    """Raise BadInputError where one of `facts`, its name, how it was and how it is, has changed."""
    for name, before, now in facts:
        if before != now:
            raise BadInputError(
                f"{path}: {name}: {before} when it was begun, {now} now; one file holds one state: {remedy}"
            )


def _append(path: Path, line: Spec) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND)
    try:
        os.write(descriptor, line.model_dump_json().encode() + b"\n")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
