"""Files that a verb writes: what is wrong with a name is said before the work begins, not after it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from moe_bench.errors import BadInputError


def file_to_write(*suffixes: str) -> Callable[[Path | None], Path | None]:
    """Return an option's callback that refuses what no file can be written to, or of another suffix.

    Raises BadInputError, in one line, for a folder, for a name in a folder that does not exist or may not be
    written to, and for a suffix that is none of `suffixes`; any suffix will do where none is given.
    """

    def checked(path: Path | None) -> Path | None:
        if path is None:
            return None
        if path.is_dir():
            raise BadInputError(f"{path}: is a folder; name a file in it")
        if suffixes and path.suffix not in suffixes:
            raise BadInputError(f"{path}: is written as {', '.join(suffixes)}; change the suffix")
        if not path.parent.is_dir():
            raise BadInputError(f"{path}: there is no folder {path.parent}; make it, or name another")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise BadInputError(f"{path}: may not be written; name another file")
        return path

    return checked


picture_to_write = file_to_write(".png", ".svg", ".pdf")
"""Of what matplotlib draws."""
drawing_to_write = file_to_write(".svg")
"""Of the report's own charts."""
any_file_to_write = file_to_write()


def folder_to_write(path: Path | None) -> Path | None:
    """An option's callback that makes the folder, its parents included, before the work begins.

    Raises BadInputError, in one line, for a file, and for what cannot be made or may not be written to.
    """
    if path is None:
        return None
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadInputError(f"{path}: no folder can be made ({error.strerror}); name another") from error
    if not os.access(path, os.W_OK):
        raise BadInputError(f"{path}: may not be written; name another folder")
    return path
