"""The commands on the page about accounting print what stands there."""

import re
import shlex
from pathlib import Path

import pytest

from moe_bench.cli import main

PAGE = Path(__file__).parent.parent / "docs" / "accounting.md"
EXAMPLES = re.findall(r"^    \$ moe-bench (.+)\n((?:    .*\n|\n(?=    ))+)", PAGE.read_text(), re.MULTILINE)


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 2


@pytest.mark.parametrize(("command", "output"), EXAMPLES, ids=[command for command, _ in EXAMPLES])
def test_an_example_prints_what_the_page_shows(
    command: str, output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(command)) == 0
    printed = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert [line[4:].rstrip() for line in output.splitlines()] == printed
