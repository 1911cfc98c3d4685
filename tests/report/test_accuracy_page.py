"""The tables of accuracy in docs and README are what the code gives, within half a point."""

from __future__ import annotations

import pytest

from moe_bench.report.accuracy_page import BEGIN, END, HEADINGS, accuracy_page, readme_table, replaced
from tests.projection.published_rows import REPOSITORY
from tests.projection.registry import accuracy

DOCS = (REPOSITORY / "docs" / "accuracy.md").read_text(encoding="utf-8")
README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
HALF_A_POINT = 0.5
WRITE = "run `python benchmarks/accuracy_table.py --write`"


def printed_errors(page: str) -> dict[str, tuple[float, ...]]:
    """Errors in per cent by the first cell of every line of the table in `page`, in the order of HEADINGS."""
    table = page.partition(BEGIN)[2].partition(END)[0]
    found: dict[str, tuple[float, ...]] = {}
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == len(HEADINGS) + 2 and cells[1].isdigit():
            found.setdefault(cells[0], tuple(float(cell) for cell in cells[2:]))
    return found


def test_the_table_of_the_docs_is_that_of_the_model_left_out_within_half_a_point() -> None:
    """The other ways to leave out are slow; `accuracy --cross-validate` prints them."""
    made = accuracy("model")
    fresh = printed_errors(replaced(DOCS, accuracy_page({"model": made})))
    stated = printed_errors(DOCS)
    assert set(fresh) <= set(stated), WRITE
    for name, errors in fresh.items():
        assert stated[name] == pytest.approx(errors, abs=HALF_A_POINT), f"{name}: {WRITE}"


def test_the_table_of_the_readme_is_that_of_the_code_within_half_a_point() -> None:
    fresh = printed_errors(replaced(README, readme_table({"model": accuracy("model")})))
    assert printed_errors(README).keys() == fresh.keys(), WRITE
    for name, errors in fresh.items():
        assert printed_errors(README)[name] == pytest.approx(errors, abs=HALF_A_POINT), f"{name}: {WRITE}"


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="accuracy: begin"):
        replaced("# Projection\n", "| a |")


def test_errors_are_read_back_as_printed() -> None:
    page = "<!-- accuracy: begin -->\n| all | 3 | 1.0 | 2.0 | -3.0 | 4.0 | 5.0 |\n<!-- accuracy: end -->\n"
    assert printed_errors(page) == {"all": (1.0, 2.0, -3.0, 4.0, 5.0)}
    assert len(HEADINGS) == 5
