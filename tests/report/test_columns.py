"""Cells are whole at every width; what there is no room for is named, and a pipe gets everything."""

import io

import pytest
from rich.console import Console, Group

from moe_bench.report.columns import Columns

TABLE = Columns(
    headings=("name", "number", "words"),
    rows=(("a-name-of-20-letters", "1.5", "some words"), ("b", "10", "")),
    right=frozenset(("number",)),
)
STACKED = Columns(headings=TABLE.headings, rows=TABLE.rows, right=TABLE.right, is_stacked=True)
NAME, NUMBER, WORDS = 20, 6, 10
WHOLE = NAME + 2 + NUMBER + 2 + WORDS


@pytest.mark.parametrize("width", [None, WHOLE, WHOLE + 1])
@pytest.mark.parametrize("table", [TABLE, STACKED])
def test_where_all_fits_a_row_is_a_line(table: Columns, width: int | None) -> None:
    lines = table.lines(width)
    assert lines.head == ("name                  number  words",)
    assert lines.body == ("a-name-of-20-letters     1.5  some words", "b                         10")
    assert lines.missing == ""


@pytest.mark.parametrize(
    ("width", "hidden"),
    [(WHOLE - 1, "words"), (NAME + 2 + NUMBER, "words"), (NAME + 2 + NUMBER - 1, "number, words"),
     (5, "number, words")],
)  # fmt: skip
def test_the_last_columns_go_first_and_are_named(width: int, hidden: str) -> None:
    lines = TABLE.lines(width)
    assert f"not shown in {width} columns: {hidden};" in lines.missing
    assert [line.split()[0] for line in lines.body] == ["a-name-of-20-letters", "b"]
    assert all(len(line) <= max(width, NAME) for line in lines.body)


def test_a_stacked_table_gives_its_names_lines_of_their_own_before_it_drops_anything() -> None:
    lines = STACKED.lines(WHOLE - 1)
    assert lines.head == ("name", "    number  words")
    assert lines.body == ("a-name-of-20-letters", "       1.5  some words", "b", "        10")
    assert lines.missing == ""
    assert "words" in STACKED.lines(4 + NUMBER).missing


def test_a_terminal_has_a_width_and_a_pipe_has_none() -> None:
    def printed(*, is_terminal: bool) -> str:
        file = io.StringIO()
        console = Console(file=file, width=WHOLE - 1, force_terminal=is_terminal, color_system=None)
        console.print(Group(TABLE), crop=False)
        return file.getvalue()

    assert "some words" in printed(is_terminal=False)
    assert "not shown" not in printed(is_terminal=False)
    assert "some words" not in printed(is_terminal=True)
    assert "not shown in 39 columns: words" in printed(is_terminal=True)
