"""Which records a reader asks for: by model, recipe, scale, status, system, commit, date and the like."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from moe_bench.errors import BadInputError
from moe_bench.results.entry import Entry
from moe_bench.results.published import model_key
from moe_bench.spec.load import UnknownNameError


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """What is asked for; None asks for anything."""

    model: str | None = None
    """Folder under `recipes/`, or the name as printed."""
    recipe: str | None = None
    """`<model>/<run>`, or `<run>` alone."""
    scale: str | None = None
    status: str | None = None
    system: str | None = None
    precision: str | None = None
    num_ranks: int | None = None
    commit: str | None = None
    """First digits of a commit."""
    job: str | None = None
    """As in the record, or the scheduler's number alone."""
    since: str | None = None
    """UTC date, or date and time, as ISO 8601 has them; inclusive."""
    until: str | None = None
    """The same; a date includes its whole day."""
    is_modified: bool | None = None


def queried(entries: Iterable[Entry], asked: Query) -> tuple[Entry, ...]:
    """The entries that answer to `asked`, newest first.

    Raises UnknownNameError with the nearest names where none has the model, recipe, scale, status, system or
    precision that is asked for, BadInputError for what is no date.
    """
    found = tuple(entries)
    for what, name, key in (
        ("model", None if asked.model is None else model_key(asked.model), lambda entry: (entry.model,)),
        ("recipe", asked.recipe, lambda entry: (entry.recipe, entry.recipe.partition("/")[2])),
        ("scale", asked.scale, lambda entry: (entry.scale,)),
        ("status", asked.status, lambda entry: (entry.status.value,)),
        ("system", asked.system, lambda entry: (entry.system,)),
        ("precision", asked.precision, lambda entry: (entry.precision,)),
    ):
        if name is not None:
            known = sorted({known for entry in found for known in key(entry)})
            if name not in known:
                raise UnknownNameError(f"result with {what}", name, known)
            found = tuple(entry for entry in found if name in key(entry))
    since, until = _start(asked.since, "--since"), _start(asked.until, "--until")
    kept = (
        entry
        for entry in found
        if asked.num_ranks in (None, entry.num_ranks)
        and (asked.commit is None or entry.commit.startswith(asked.commit[:8]))
        and asked.job in (None, entry.job_id, entry.job_number)
        and asked.is_modified in (None, bool(entry.modified))
        and (since is None or entry.started_at >= since)
        and (until is None or entry.started_at[: len(until)] <= until)
    )
    return tuple(sorted(kept, key=lambda entry: (entry.started_at, entry.repeat), reverse=True))


def _start(text: str | None, option: str) -> str | None:
    if text is None:
        return None
    try:
        datetime.fromisoformat(text)
    except ValueError as error:
        raise BadInputError(f"{option} {text}: {error}; write 2026-11-22 or 2026-11-22T07:30") from error
    return text.replace(" ", "T")


def entry_by_id(entries: Sequence[Entry], asked: str) -> Entry:
    """The one record that `asked` names: its id, its path, its job, or a part of its id that no other has.

    Digits are a job, or how the id begins: within a time stamp any two of them stand somewhere.

    Raises UnknownNameError with the nearest ids, BadInputError where several are meant.
    """
    exact = [entry for entry in entries if asked == entry.id or Path(asked) == entry.path]
    found = exact or [entry for entry in entries if asked in (entry.job_id, entry.job_number)]
    found = found or [
        entry for entry in entries if (entry.id.startswith(asked) if asked.isdecimal() else asked in entry.id)
    ]
    if not found:
        raise UnknownNameError("result", asked, [entry.id for entry in entries])
    if len(found) > 1:
        shown = ", ".join([*(entry.id for entry in found[:4]), *(["..."] if len(found) > 4 else [])])
        raise BadInputError(f"{asked}: {len(found)} results are meant, {shown}; write more of the id")
    return found[0]
