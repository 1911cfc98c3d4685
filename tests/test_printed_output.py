"""Commands in docs print what stands below them."""

from importlib.util import find_spec

import pytest

from moe_bench.cli import gpu
from tests.printed_output import PAGES, ROOT, TABLES, Example, elided, examples, printed, with_table

EXAMPLES = [example for page in PAGES for example in examples(page)]


def test_the_pages_with_examples_have_them() -> None:
    assert {"README.md", "accounting.md", "check.md", "layer.md"} <= {example.page for example in EXAMPLES}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.page}:{example.first_line}")
def test_an_example_prints_what_the_page_shows(example: Example, monkeypatch: pytest.MonkeyPatch) -> None:
    if example.command.startswith("calibrate") and find_spec("transformer_engine") is not None:
        pytest.skip("the page shows the plan of a machine without Transformer Engine")
    monkeypatch.setattr(gpu, "gpu_here", lambda: None)
    assert example.again() == example.shown, "run `python -m tests.printed_output`"


@pytest.mark.parametrize(("name", "mark", "command"), TABLES)
def test_a_table_between_marks_is_the_one_that_is_printed(name: str, mark: str, command: str) -> None:
    page = (ROOT / name).read_text()
    assert with_table(page, mark, printed(command)) == page, "run `python -m tests.printed_output`"


def test_what_a_page_leaves_out_is_left_out() -> None:
    lines = ["a 1", "b 2", "c 3", "d 4", "e 5"]
    assert elided(lines, ["a 0", "...", "d 0", "..."]) == ("a 1", "...", "d 4", "...")
    assert elided(lines, ["...", "d 0", "e 0"]) == ("...", "d 4", "e 5")
    assert elided(lines, ["a 0"]) == tuple(lines)
