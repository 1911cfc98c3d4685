"""A table whose cells are never folded: a name that is cut in two can be neither copied nor searched for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

_GAP = "  "
_INDENT = "    "


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """A table as it is printed."""

    head: tuple[str, ...]
    """The headings, in one line or two."""
    body: tuple[str, ...]
    missing: str
    """Which columns there is no room for; empty where there is."""

    def __str__(self) -> str:
        return "\n".join(filter(None, (*self.head, *self.body, self.missing)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Rows under headings, the most important columns first; those that do not fit are left out and named.

    A terminal shows what its width allows, a pipe gets everything. Only the first column may be wider.
    """

    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: frozenset[str] = frozenset()
    """Headings of the columns of numbers."""
    is_stacked: bool = False
    """Where not all columns fit, the first one has lines of its own above the others."""

    def lines(self, width: int | None) -> Lines:
        """The table in `width` characters; None is without limit."""
        sizes = [max(map(len, column)) for column in zip(self.headings, *self.rows, strict=True)]
        layout: tuple[range, ...] = (_fitting(sizes, 0, width),)
        if self.is_stacked and width is not None and len(layout[0]) < len(sizes):
            layout = (range(1), _fitting(sizes, 1, width - len(_INDENT)))
        hidden = self.headings[sum(map(len, layout)) :]
        return Lines(
            head=tuple(self._line(self.headings, sizes, layout)),
            body=tuple(line for row in self.rows for line in self._line(row, sizes, layout)),
            missing=f"not shown in {width} columns: {', '.join(hidden)}; into a pipe or with --json all are"
            if hidden
            else "",
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """What `print` shows; a pipe has no width."""
        from rich.text import Text

        lines = self.lines(options.max_width if console.is_terminal else None)
        for some, style in ((lines.head, "bold"), (lines.body, ""), ((lines.missing,), "dim")):
            for line in filter(None, some):
                yield Text(line, style=style, no_wrap=True, overflow="ignore")

    def _line(self, row: Sequence[str], sizes: Sequence[int], layout: Sequence[range]) -> Iterator[str]:
        for number, columns in enumerate(layout):
            cells = (
                row[index].rjust(sizes[index])
                if self.headings[index] in self.right
                else row[index].ljust(sizes[index])
                for index in columns
            )
            yield (_INDENT * number + _GAP.join(cells)).rstrip()


def _fitting(sizes: Sequence[int], first: int, width: int | None) -> range:
    """The columns from `first` on that fit one line, one at least."""
    ends = itertools.accumulate(size + len(_GAP) for size in sizes[first:])
    num_fitting = sum(width is None or end - len(_GAP) <= width for end in ends)
    return range(first, first + max(1, num_fitting))
