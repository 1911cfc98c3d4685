"""Finds the commands that docs show with their output and runs them again.

`python -m tests.printed_output` writes what they print today into the pages.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from moe_bench.cli import main

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
ELIDED = "..."
QUICK = ("audit", "check", "project", "show")
"""Verbs that are run again, as every `--plan` is: the same on all machines without a GPU, in a second."""
TABLES = (("README.md", "defaults", "list --defaults"), ("docs/check.md", "rules", "check --rules"))
"""Pages with a table between two marks, and the command that prints it."""
_COMMAND = re.compile(r"(?P<indent> {4}|)\$ moe-bench (?P<words>.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A command on a page, and the lines below it, without their indentation."""

    page: str
    first_line: int
    """Index of the first line of output."""
    indent: str
    command: str
    shown: tuple[str, ...]

    def again(self) -> tuple[str, ...]:
        """What the command prints today, with what the page leaves out left out."""
        return elided([line.rstrip() for line in printed(self.command).splitlines()], self.shown)


def printed(command: str) -> str:
    """What `moe-bench COMMAND` prints in the root of the repository, on either stream."""
    out = io.StringIO()
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        main(shlex.split(command))
    return out.getvalue()


def examples(page: Path) -> Iterator[Example]:
    """Commands of quick verbs with output; in an indented block or in one between fences."""
    lines = page.read_text().splitlines()
    for number, line in enumerate(lines):
        match = _COMMAND.fullmatch(line)
        if match is None or not (match["words"].split()[0] in QUICK or "--plan" in match["words"].split()):
            continue
        shown = tuple(_output(lines[number + 1 :], match["indent"]))
        if shown:
            yield Example(
                page=page.name,
                first_line=number + 1,
                indent=match["indent"],
                command=match["words"],
                shown=shown,
            )


def elided(lines: Sequence[str], shown: Sequence[str]) -> tuple[str, ...]:
    """The part of `lines` that a page shows which has `...` for some lines.

    What stands before the first `...` is the beginning, behind the last the end, between two as many lines
    from the first one on that begins with the same word.
    """
    marks = [index for index, line in enumerate(shown) if line == ELIDED]
    if not marks:
        return tuple(lines)
    found = list(lines[: marks[0]])
    for begin, end in zip(marks, [*marks[1:], len(shown)], strict=True):
        part = shown[begin + 1 : end]
        word = part[0].split()[:1] if part else []
        start = len(lines) - len(part)
        if end < len(shown):
            start = next((at for at, line in enumerate(lines) if line.split()[:1] == word), start)
        found += [ELIDED, *lines[start : start + len(part)]]
    return tuple(found)


def _output(lines: Sequence[str], indent: str) -> Iterator[str]:
    """Up to the next command or the end of the block; blank lines at the end are the page's."""
    blank = 0
    for line in lines:
        if not line.strip():
            blank += 1
            continue
        if not line.startswith(indent) or line.startswith((f"{indent}$ ", "```")):
            return
        yield from [""] * blank
        blank = 0
        yield line.removeprefix(indent).rstrip()


def with_table(page: str, mark: str, table: str) -> str:
    """The text `page` with `table` between its marks."""
    before, begin, rest = page.partition(f"<!-- {mark}: begin -->\n")
    _, end, after = rest.partition(f"\n<!-- {mark}: end -->")
    assert begin
    assert end
    return f"{before}{begin}{table.strip()}{end}{after}"


def rewrite(page: Path) -> None:
    """Put what the commands print today into `page`."""
    lines = page.read_text().splitlines()
    for example in reversed(list(examples(page))):
        now = [(example.indent + line).rstrip() for line in example.again()]
        lines[example.first_line : example.first_line + len(example.shown)] = now
    page.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    os.environ.pop("COLUMNS", None)
    for path in PAGES:
        rewrite(path)
    for name, mark, command in TABLES:
        path = ROOT / name
        path.write_text(with_table(path.read_text(), mark, printed(command)))
