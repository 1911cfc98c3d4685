"""Where documents begin and end, however a file is cut into pieces, and what of a file cannot be read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.errors import BadInputError
from moe_bench.harness.data.documents import pieces, read_documents
from moe_bench.spec.dataset import Documents

LINE = st.text(st.characters(codec="utf-8", exclude_characters="\r\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"))


def read(path: Path, documents: Documents, *, piece_bytes: int, key: str = "text") -> list[str]:
    return [
        text
        for start, end in pieces(path, documents, piece_bytes=piece_bytes)
        for text in read_documents(path, start, end, documents=documents, jsonl_key=key)
    ]


@given(st.lists(LINE), st.integers(1, 40), st.booleans())
def test_json_lines_are_the_same_documents_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, texts: list[str], piece_bytes: int, ends: bool
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts) + ("\n" if ends else ""))
    assert read(path, "jsonl", piece_bytes=piece_bytes) == [text for text in texts if text.strip()]


@given(st.lists(LINE), st.integers(1, 40))
def test_paragraphs_are_the_same_documents_in_any_pieces(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], piece_bytes: int
) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.txt"
    path.write_bytes("\n".join(lines).encode())
    whole = read(path, "paragraph", piece_bytes=10**6)
    assert read(path, "paragraph", piece_bytes=piece_bytes) == whole
    assert "".join("".join(whole).split()) == "".join("".join(lines).split())


def test_a_paragraph_ends_at_an_empty_line(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\ntwo\n\n \nthree\n")
    assert read(path, "paragraph", piece_bytes=1) == ["one\ntwo\n", "three\n"]
    assert read(path, "file", piece_bytes=1) == ["one\ntwo\n\n \nthree\n"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"text": "a"', "not JSON"),
        ('{"body": "a"}', "text: no text"),
        ('{"text": 3}', "text: no text"),
        ("3", "no text"),
    ],
)
def test_a_bad_line_is_named_with_its_number_in_any_pieces(tmp_path: Path, line: str, problem: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    for piece_bytes in (1, 10**6):
        with pytest.raises(BadInputError, match=f"a.jsonl:3: .*{problem}"):
            read(path, "jsonl", piece_bytes=piece_bytes)


def test_bytes_that_are_no_text_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good\n\nbad \xff")
    with pytest.raises(BadInputError, match=r"byte 10: not UTF-8"):
        read(path, "paragraph", piece_bytes=1)
