"""The command line: each verb parses, calls one function and prints."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module

import typer
from typer.models import CommandInfo

from moe_bench.cli.app import app as application
from moe_bench.errors import BadInputError, MoeBenchError
from moe_bench.results.collector import collector_paused

__all__ = ["VERBS", "app_with", "main"]

VERBS = {
    "recipes": ("list", "show", "check", "schema"),
    "predict": ("audit", "dryrun"),
    "project": ("project",),
    "search": ("search",),
    "calibrate": ("calibrate",),
    "h100": ("h100",),
    "layer": ("layer",),
    "run": ("run", "submit"),
    "jobs": ("jobs",),
    "accuracy": ("accuracy",),
    "read": ("published", "reproduce", "compare", "gate"),
    "report": ("report",),
    "results": ("results",),
    "evaluate": ("evaluate", "generate"),
    "health": ("health",),
    "model": ("verify", "convert"),
    "parity": ("parity",),
    "parity_ranks": ("parity-rank",),
    "quantize": ("quantize",),
    "train": ("train",),
    "data": ("data",),
}
"""Modules whose import registers verbs, and these in the order of `--help`."""
_ORDER = [verb for verbs in VERBS.values() for verb in verbs]
_QUICK = frozenset({"list", "show", "check", "schema", "audit", "project", "published"})
"""Verbs of a second at most, which keep what they make: a search for garbage took a seventh of `list`."""

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


def app_with(verb: str | None = None) -> typer.Typer:
    """The application with `verb`; with all of them where none is called so, as `--help` and a typo need.

    The other modules are left out: to import them and to read their options takes longer than `check` does.
    """
    asked = [module for module, verbs in VERBS.items() if verb in verbs]
    for module in asked or VERBS:
        import_module(f"moe_bench.cli.{module}")
    # in the order of the table, whatever was asked for before in this process
    application.registered_commands.sort(key=lambda command: _ORDER.index(_name(command)))
    application.registered_groups.sort(key=lambda group: _ORDER.index(str(group.name)))
    return application


def _name(command: CommandInfo) -> str:
    return str(command.name or getattr(command.callback, "__name__", ""))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that have a name are printed on one line and give their exit code."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    verb = words[0] if words else None
    with collector_paused() if verb in _QUICK else nullcontext():
        return _run(app_with(verb), words)


def _run(app: typer.Typer, words: list[str]) -> int:
    try:
        code = app(args=words, standalone_mode=False)
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
