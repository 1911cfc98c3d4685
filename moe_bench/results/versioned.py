"""Reads a JSON file of ours that states its schema version, or says what is wrong with it in one line."""

from __future__ import annotations

from pathlib import Path

from pydantic import ValidationError
from pydantic_core import from_json

from moe_bench.errors import BadInputError
from moe_bench.spec.base import Spec


class RecordError(BadInputError):
    """A file of measurements that cannot be read."""


class ForeignFileError(RecordError):
    """A file that is none of ours: another program's, or half of one."""


def read_versioned[Kind: Spec](
    path: Path, kind: type[Kind], *, what: str, version: int, older: tuple[int, ...] = ()
) -> Kind:
    """The `kind` in `path`; `what` is its name for people, as `result file`, `older` the versions that its
    schema reads beside `version`.

    Raises ForeignFileError where it is something else, RecordError where it is damaged or too new or old.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ForeignFileError(f"{path}: not a {what} ({error.strerror}); name another") from error
    return parse_versioned(text, kind, path=path, what=what, version=version, older=older)


def parse_versioned[Kind: Spec](
    text: bytes, kind: type[Kind], *, path: Path, what: str, version: int, older: tuple[int, ...] = ()
) -> Kind:
    """The same of `text`, which was read from `path`."""
    # the version is looked at only where the schema refuses: reading it first would parse every file twice
    try:
        found = kind.model_validate_json(text)
    except ValidationError as error:
        raise _reason(text, error, path=path, what=what, versions=(version, *older)) from error
    if "schema_version" not in found.model_fields_set:
        raise ForeignFileError(f"{path}: not a {what} (no schema_version); remove it or name another")
    return found


def _reason(
    text: bytes, error: ValidationError, *, path: Path, what: str, versions: tuple[int, ...]
) -> RecordError:
    try:
        tree = from_json(text)
    except ValueError as broken:
        return ForeignFileError(f"{path}: not a {what} ({broken}); remove it or name another")
    if not isinstance(tree, dict) or "schema_version" not in tree:
        return ForeignFileError(f"{path}: not a {what} (no schema_version); remove it or name another")
    if tree["schema_version"] not in versions:
        return RecordError(
            f"{path}: schema_version: {tree['schema_version']}, {versions[0]} is read here; "
            "use the release that wrote it"
        )
    first = error.errors(include_url=False, include_input=False)[0]
    field = ".".join(str(element) for element in first["loc"])
    return RecordError(f"{path}: {field}: {first['msg']}; the file was changed or cut short")
