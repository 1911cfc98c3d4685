"""A folder that gets its name when it is whole: nothing half-written is ever found under it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from moe_bench.errors import BadInputError, MissingRequirementError


@contextlib.contextmanager
def finished_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, renamed to it when the block ends, removed where the block fails.

    Raises BadInputError where `path` is taken, MissingRequirementError where the disk refuses.
    """
    if path.exists():
        raise BadInputError(f"{path}: is there already; name a new folder, or remove it")
    unfinished = path.with_name(f".{path.name}.unfinished-{os.getpid()}")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        _sync(unfinished)
        unfinished.rename(path)
        _sync(path.parent)
    except (OSError, RuntimeError) as error:
        refusal = _of_the_system(error)
        if refusal is None:
            raise
        reason = refusal.strerror or str(refusal)
        raise MissingRequirementError(f"{path}: {reason}; nothing of it was kept") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _of_the_system(error: BaseException | None) -> OSError | None:
    """What the system said under `error`.

    Where a tensor does not fit, torch's writer raises a RuntimeError of its own over it as it closes the
    file (caffe2/serialize/inline_container.cc, "unexpected pos").
    """
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _sync(folder: Path) -> None:
    """Have the names in a folder on disk before anything relies on them."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
