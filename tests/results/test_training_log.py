"""The log of a training run: read back, cut where the run goes on, and what is no line of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.errors import BadInputError
from moe_bench.results.training_log import LOG, LogLine, append_line, cut_log, read_log


def line(step: int) -> LogLine:
    return LogLine(step=step, loss=3.0 / step, grad_norm=1.0, learning_rate=1e-3, validation_loss=None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for step in (1, 2, 3):
        append_line(tmp_path, line(step))
    return tmp_path


def test_lines_are_read_back_and_one_that_a_kill_cut_short_is_passed_over(folder: Path) -> None:
    with (folder / LOG).open("a") as file:
        file.write('{"step": 4, "lo')
    assert list(read_log(folder)) == [line(1), line(2), line(3)]


def test_what_is_taken_again_is_dropped(folder: Path) -> None:
    cut_log(folder, num_steps=2)
    assert list(read_log(folder)) == [line(1), line(2)]
    assert {path.name for path in folder.iterdir()} == {LOG}


def test_a_line_of_something_else_is_named(folder: Path) -> None:
    with (folder / LOG).open("a") as file:
        file.write('{"step": 4}\n')
    with pytest.raises(BadInputError, match=r"log\.jsonl:4: no line of a training log"):
        list(read_log(folder))


def test_a_run_that_said_nothing_has_no_lines(tmp_path: Path) -> None:
    assert list(read_log(tmp_path)) == []
