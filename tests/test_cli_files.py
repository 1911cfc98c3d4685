"""Files that verbs write, and options that cannot be: they end before the work, in one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import typer

from moe_bench.cli import app_with, main
from moe_bench.cli.files import (
    any_file_to_write,
    drawing_to_write,
    folder_to_write,
    picture_to_write,
)
from moe_bench.errors import BadInputError

FILES = {"--plot", "--plot-pipeline", "--trace", "--html", "--junit", "--summary"}


def test_every_option_that_names_a_file_to_write_is_checked() -> None:
    root = typer.main.get_command(app_with())
    options = [
        (verb, option)
        for verb, command in root.commands.items()  # type: ignore[attr-defined]
        for option in command.params
        if FILES & set(option.opts)
    ]
    assert len(options) >= 10
    assert [(verb, option.name) for verb, option in options if option.callback is None] == []


def test_what_can_be_written_is_taken_as_it_is(tmp_path: Path) -> None:
    for name in ("a.svg", "b.json"):
        assert any_file_to_write(tmp_path / name) == tmp_path / name
    assert picture_to_write(tmp_path / "a.pdf") == tmp_path / "a.pdf"
    assert drawing_to_write(None) is None


@pytest.mark.parametrize(
    ("name", "problem"),
    [(".", "is a folder"), ("a/b.svg", "there is no folder"), ("a.jpeg", "change the suffix")],
)
def test_what_cannot_be_written_is_refused(name: str, problem: str, tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=problem):
        picture_to_write(tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_what_may_not_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BadInputError, match="may not be written"):
        any_file_to_write(tmp_path / "a.json")


def test_a_folder_to_write_is_there_before_the_work(tmp_path: Path) -> None:
    assert folder_to_write(tmp_path / "a" / "b") == tmp_path / "a" / "b"
    assert (tmp_path / "a" / "b").is_dir()
    assert folder_to_write(None) is None
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        with pytest.raises(BadInputError, match="no folder can be made"):
            folder_to_write(tmp_path / name)


def test_a_folder_for_a_page_ends_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "--html", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines() == [f"{tmp_path}: is a folder; name a file in it"]


def test_a_file_in_place_of_a_folder_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("", encoding="utf-8")
    arguments = ["search", "olmoe_1b_7b", "--system", "h100_sxm", "--num-gpus", "8"]
    assert main([*arguments, "--write", str(tmp_path / "taken")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_wrong_value_is_refused_with_the_name_of_its_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["project", "olmoe_1b_7b", "--train-tokens", "inf"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'--train-tokens'" in line
