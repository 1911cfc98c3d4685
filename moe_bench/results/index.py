"""The index of a folder of records: what each of them says, in a file beside them that can be deleted.

Nothing is known by it alone. A record is read again when its size or change time differs from what the index
has seen, and all are when the code that derives the numbers differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import batched, islice
from pathlib import Path
from typing import NamedTuple

from pydantic_core import from_json

import moe_bench
from moe_bench.results.collector import collector_paused
from moe_bench.results.entry import Entry, entry_of
from moe_bench.results.metrics import RunMetrics
from moe_bench.results.store import record_files
from moe_bench.results.summary import RunSummary, Status, read_summary
from moe_bench.results.versioned import RecordError
from moe_bench.results.workers import over_files
from moe_bench.spec.scale import Plan

INDEX_NAME = ".moe_bench_index.sqlite"
BATCH = 64
"""Records per transaction: what is lost when a build is killed."""
MIN_RECORDS = 50
"""Fewer are read in half a second, and a small folder, such as a baseline under git, gets no file of ours."""
LOCK_WAIT_S = 60.0
DERIVING = ("spec", "analysis", "results")
"""Packages whose code decides what the index says of a record."""

_TABLES = (
    "CREATE TABLE file (path TEXT PRIMARY KEY, num_bytes INTEGER, changed_ns INTEGER, problem TEXT, "
    "entry TEXT, summary TEXT)",
    "CREATE TABLE shared (digest TEXT PRIMARY KEY, content TEXT)",
)
"""`shared` holds plans, facts and software, which many records have in common."""

OnProgress = Callable[[int, int], None]
"""Called with the number of files that were read and of those to read."""


class _Stamp(NamedTuple):
    """By what a changed file is known; the change time, unlike the modification time, cannot be set."""

    num_bytes: int
    changed_ns: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Row:
    """What is stored of one file: `problem`, or the rest."""

    path: str
    problem: str | None = None
    entry: str | None = None
    summary: str | None = None
    shared: dict[str, str] = dataclasses.field(default_factory=dict)


class Index:
    """The records below `root`, as the database `db` knows them."""

    def __init__(self, root: Path, db: sqlite3.Connection) -> None:
        self._root, self._db = root, db

    def refresh(self, under: Path, on_progress: OnProgress) -> None:
        """Bring what is known of the files below `under` up to date; killed, it goes on from where it was.

        `on_progress` is called after every transaction, and not at all where nothing has changed.
        """
        prefix = self._prefix(under)
        found = dict(_stamps(under, prefix))
        rows = self._db.execute("SELECT path, num_bytes, changed_ns FROM file").fetchall()
        known = {path: _Stamp(*stamp) for path, *stamp in rows if path.startswith(prefix)}
        with _transaction(self._db):
            self._db.executemany(
                "DELETE FROM file WHERE path = ?", [(gone,) for gone in known.keys() - found]
            )
        stale = sorted(path for path, stamp in found.items() if known.get(path) != stamp)
        num_done = 0
        for rows_read in batched(over_files(_read, [(self._root, name) for name in stale]), BATCH):
            with _transaction(self._db):
                for row in rows_read:
                    self._put(row, found[row.path])
            num_done += len(rows_read)
            on_progress(num_done, len(stale))

    def _put(self, row: _Row, stamp: _Stamp) -> None:
        columns = (row.path, *stamp, row.problem, row.entry, row.summary)
        self._db.execute("INSERT OR REPLACE INTO file VALUES (?, ?, ?, ?, ?, ?)", columns)
        self._db.executemany("INSERT OR IGNORE INTO shared VALUES (?, ?)", row.shared.items())

    def entries(self, under: Path) -> tuple[Entry, ...]:
        """The records below `under`, by path."""
        rows = self._select("entry", "entry IS NOT NULL", under)
        return tuple(_entry(self._root / path, entry) for path, entry in rows)

    def problems(self, under: Path) -> tuple[str, ...]:
        """What is wrong with the files below `under` that are no readable records, each with its name."""
        return tuple(problem for _, problem in self._select("problem", "problem IS NOT NULL", under))

    def runs(self, under: Path, wanted: Callable[[Entry], bool]) -> tuple[tuple[Entry, RunSummary], ...]:
        """The records below `under` that are `wanted`, by path, with their summaries."""
        shared = _Shared(self._db)
        rows = self._select("entry, summary", "entry IS NOT NULL", under)
        with collector_paused():
            entries = ((_entry(self._root / path, entry), summary) for path, entry, summary in rows)
            return tuple((entry, _summary(text, shared)) for entry, text in entries if wanted(entry))

    def _select(self, columns: str, condition: str, under: Path) -> Iterator[tuple[str, ...]]:
        """Rows of a path and `columns`, by path."""
        rows = self._db.execute(f"SELECT path, {columns} FROM file WHERE {condition} ORDER BY path")
        prefix = self._prefix(under)
        return (row for row in rows if row[0].startswith(prefix))

    def _prefix(self, under: Path) -> str:
        return "" if under == self._root else f"{under.relative_to(self._root).as_posix()}/"


@contextmanager
def open_index(place: Path, tell: Callable[[str], None]) -> Iterator[Index]:
    """The index that covers `place`: that of the nearest folder above which has one, or a new one in `place`.

    It is in memory where the records are few; and where it cannot be written, with a line to `tell` that says
    why.
    """
    roots = (place, *place.parents[:2])
    root = next((root for root in roots if (root / INDEX_NAME).is_file()), place)
    with closing(_database(root / INDEX_NAME, tell)) as db:
        yield Index(root, db)


def _database(path: Path, tell: Callable[[str], None]) -> sqlite3.Connection:
    try:
        return _prepared(_connect(str(path) if path.is_file() or _is_large(path.parent) else ":memory:"))
    except sqlite3.OperationalError as error:
        tell(f"{path}: {error}; what is not in it is read again every time")
        return _prepared(_copy_in_memory(path))
    except sqlite3.DatabaseError:  # not a database, or a damaged one: it held nothing of its own
        path.unlink()
        return _prepared(_connect(str(path)))


def _is_large(folder: Path) -> bool:
    return sum(1 for _ in islice(record_files(str(folder)), MIN_RECORDS)) >= MIN_RECORDS


def _connect(place: str, *, is_uri: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(place, timeout=LOCK_WAIT_S, isolation_level=None, uri=is_uri)


def _copy_in_memory(path: Path) -> sqlite3.Connection:
    memory = _connect(":memory:")
    if path.is_file():
        with closing(_connect(f"{path.absolute().as_uri()}?mode=ro", is_uri=True)) as on_disk:
            on_disk.backup(memory)
    return memory


def _prepared(db: sqlite3.Connection) -> sqlite3.Connection:
    """`db` with tables for this code, emptied where other code has filled them. Raises sqlite3.Error."""
    version = _code_version()
    with _transaction(db):
        if db.execute("PRAGMA user_version").fetchone()[0] != version:
            for table in ("file", "shared"):
                db.execute(f"DROP TABLE IF EXISTS {table}")
            for statement in _TABLES:
                db.execute(statement)
        # written every time, so that a database which cannot be written is found here
        db.execute(f"PRAGMA user_version = {version}")
    return db


def _code_version() -> int:
    """31 bits of a digest of the sources that derive what is stored: sqlite keeps such a number for us."""
    package = Path(moe_bench.__file__).parent
    digest = hashlib.sha256()
    for name in DERIVING:
        for source in sorted((package / name).rglob("*.py")):
            digest.update(source.read_bytes())
    return int.from_bytes(digest.digest()[:4]) >> 1


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[None]:
    with db:
        db.execute("BEGIN IMMEDIATE")
        yield


def _stamps(folder: Path, prefix: str) -> Iterator[tuple[str, _Stamp]]:
    start = len(f"{folder}/")
    for entry in record_files(str(folder)):
        with suppress(FileNotFoundError):  # removed since the folder was read
            status = entry.stat()
            yield prefix + entry.path[start:], _Stamp(status.st_size, status.st_ctime_ns)


def _read(work: tuple[Path, str]) -> _Row:
    root, name = work
    path = root / name
    try:
        summary = read_summary(path)
    except RecordError as error:
        return _Row(path=name, problem=str(error))
    entry = dataclasses.asdict(entry_of(summary, path))
    del entry["path"]
    shared = {
        "plan": summary.plan.model_dump_json(),
        "facts": json.dumps(dict(summary.facts)),
        "software": json.dumps(dict(summary.software)),
    }
    own = {
        "started_at": summary.started_at,
        "commit": summary.commit,
        "job_id": summary.job_id,
        "repeat": summary.repeat,
        "num_ranks": summary.num_ranks,
        "metrics": dataclasses.asdict(summary.metrics),
        "gpu_s_per_token": summary.gpu_s_per_token,
    }
    digests = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in shared.items()}
    return _Row(
        path=name,
        entry=json.dumps(entry),
        summary=json.dumps(own | digests),
        shared={digests[name]: text for name, text in shared.items()},
    )


def _entry(path: Path, text: str) -> Entry:
    fields = from_json(text)
    fields |= {"modified": tuple(fields["modified"]), "status": Status(fields["status"])}
    return Entry(path=path, **fields)


class _Shared:
    """Texts that many records have in common, each parsed once."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db
        self._plans: dict[str, Plan] = {}
        self._facts: dict[str, dict[str, str]] = {}

    def plan(self, digest: str) -> Plan:
        if digest not in self._plans:
            self._plans[digest] = Plan.model_validate_json(self._text(digest))
        return self._plans[digest]

    def facts(self, digest: str) -> dict[str, str]:
        if digest not in self._facts:
            self._facts[digest] = from_json(self._text(digest))
        return self._facts[digest]

    def _text(self, digest: str) -> str:
        content: str = self._db.execute("SELECT content FROM shared WHERE digest = ?", (digest,)).fetchone()[
            0
        ]
        return content


def _summary(text: str, shared: _Shared) -> RunSummary:
    fields = from_json(text)
    metrics = fields["metrics"] | {"outlier_steps": tuple(fields["metrics"]["outlier_steps"])}
    return RunSummary(
        **fields
        | {
            "plan": shared.plan(fields["plan"]),
            "facts": shared.facts(fields["facts"]),
            "software": shared.facts(fields["software"]),
            "metrics": RunMetrics(**metrics),
            "gpu_s_per_token": tuple(fields["gpu_s_per_token"]),
        }
    )
