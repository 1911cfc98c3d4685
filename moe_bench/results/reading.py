"""How verbs come by runs: from files as they are, from folders through their index."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from moe_bench.errors import BadInputError
from moe_bench.results.entry import Entry, entry_of
from moe_bench.results.index import Index, OnProgress, open_index
from moe_bench.results.record import Record
from moe_bench.results.store import read_record
from moe_bench.results.summary import RunSummary, read_summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Listener:
    """Who is told what a reader meets on its way."""

    on_skipped: Callable[[str], None]
    """A file in a folder that is no readable record: its name and what is wrong."""
    on_note: Callable[[str], None]
    """That the index cannot be kept, and why."""
    on_progress: OnProgress


def refuse(problem: str) -> None:
    """`on_skipped` where nothing may be left out. Raises BadInputError."""
    raise BadInputError(problem)


def read_entries(places: tuple[Path, ...], listener: Listener) -> Iterator[Entry]:
    """The records in files and below folders, in the order of their paths.

    Raises RecordError where a file that was named itself is no readable record.
    """
    for place in places:
        if place.is_dir():
            with _fresh_index(place, listener) as index:
                entries = index.entries(place)
            yield from entries
        else:
            yield entry_of(read_summary(place), place)


def read_summaries(
    places: tuple[Path, ...], listener: Listener, *, wanted: Callable[[Entry], bool] = lambda _: True
) -> Iterator[RunSummary]:
    """The summaries of the records that are `wanted`, found as by `read_entries`."""
    return (summary for _, summary in _read(places, listener, wanted))


def read_newest(
    places: tuple[Path, ...], listener: Listener
) -> tuple[tuple[Record, ...], tuple[RunSummary, ...]]:
    """The newest record of each recipe, scale and change in full, and the summaries of the others."""
    found = sorted(_read(places, listener, lambda _: True), key=lambda one: one[0].started_at)
    newest = {(entry.recipe, entry.scale, entry.modified): entry.path for entry, _ in found}
    paths = set(newest.values())
    older = tuple(summary for entry, summary in found if entry.path not in paths)
    return tuple(map(read_record, sorted(paths))), older


def _read(
    places: tuple[Path, ...], listener: Listener, wanted: Callable[[Entry], bool]
) -> Iterator[tuple[Entry, RunSummary]]:
    for place in places:
        if place.is_dir():
            with _fresh_index(place, listener) as index:
                yield from index.runs(place, wanted)
        else:
            summary = read_summary(place)
            entry = entry_of(summary, place)
            if wanted(entry):
                yield entry, summary


@contextmanager
def _fresh_index(place: Path, listener: Listener) -> Iterator[Index]:
    with open_index(place, listener.on_note) as index:
        index.refresh(place, listener.on_progress)
        for problem in index.problems(place):
            listener.on_skipped(problem)
        yield index
