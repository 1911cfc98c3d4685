"""A routing matrix is read from JSON, or refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.errors import BadInputError
from moe_bench.spec.routing_matrix import read_counts


def test_a_matrix_is_a_list_of_lists(tmp_path: Path) -> None:
    path = tmp_path / "matrix.json"
    path.write_text("[[1, 2], [3, 0]]")
    assert read_counts(path) == ((1, 2), (3, 0))


@pytest.mark.parametrize("text", ["", "[1, 2]", '{"a": 1}', "[[1.5]]", "[[-1]]", "[[1], "])
def test_anything_else_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "matrix.json"
    path.write_text(text)
    with pytest.raises(BadInputError, match="not a matrix of counts; write a JSON list with one list"):
        read_counts(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match=r"gone\.json: No such file or directory"):
        read_counts(tmp_path / "gone.json")
