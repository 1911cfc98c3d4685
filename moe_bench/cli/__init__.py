"""The command line: each verb parses, calls one function and prints."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import typer

from moe_bench.cli import (
    accuracy,
    calibrate,
    data,
    evaluate,
    h100,
    health,
    jobs,
    layer,
    model,
    parity,
    predict,
    project,
    quantize,
    read,
    recipes,
    report,
    results,
    run,
    search,
    train,
)
from moe_bench.cli.app import PANELS, app
from moe_bench.errors import BadInputError, MoeBenchError

__all__ = ["app", "main"]

_VERBS = (
    recipes,
    project,
    search,
    predict,
    run,
    calibrate,
    layer,
    h100,
    jobs,
    read,
    accuracy,
    report,
    results,
    data,
    model,
    train,
    evaluate,
    health,
    parity,
    quantize,
)
"""Modules whose import registers the verbs."""

_ABOUT_A_PLACE = frozenset(
    {
        errno.EACCES,
        errno.EDQUOT,
        errno.EEXIST,
        errno.EISDIR,
        errno.ENAMETOOLONG,
        errno.ENOSPC,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)
"""What the system says of a place that a user named or filled; any other failure of a file is ours."""
_ABOUT_A_DISK = frozenset({errno.EDQUOT, errno.ENOSPC})
"""What it says while a file is written, without the name of the file."""

app.registered_commands.sort(key=lambda command: PANELS.index(str(command.rich_help_panel)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that have a name are printed on one line and give their exit code."""
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except MoeBenchError as error:
        # a note is what a failed rank wrote to its standard error; a user's own mistake has none
        typer.echo("\n".join((str(error), *getattr(error, "__notes__", ()))), err=True)
        return error.exit_code
    except typer.TyperException as error:
        typer.echo(error.format_message(), err=True)
        return BadInputError.exit_code
    except OSError as error:
        if error.errno not in (_ABOUT_A_PLACE if error.filename is not None else _ABOUT_A_DISK):
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        typer.echo(f"{where}{error.strerror}; free the place, or name another", err=True)
        return BadInputError.exit_code
    except typer.Abort:
        return 130
    return int(code or 0)
