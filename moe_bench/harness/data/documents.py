"""Documents of plain text and JSON lines, in pieces of a few megabytes that can be read one by one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from moe_bench.errors import BadInputError
from moe_bench.spec.dataset import Documents

PIECE_BYTES = 16 * 1024**2
"""Of a file, what is tokenized between two entries of the journal; a piece ends where a document does."""


def pieces(path: Path, documents: Documents, *, piece_bytes: int = PIECE_BYTES) -> Iterator[tuple[int, int]]:
    """Byte ranges of `path`, one behind the other, none of which cuts a document.

    A file of one document is one piece, so it must fit the memory.
    """
    size = path.stat().st_size
    if documents == "file":
        yield 0, size
        return
    start = 0
    with path.open("rb") as file:
        while start < size:
            # one byte back, so that what is read first is the rest of the line that this byte is in
            file.seek(min(start + piece_bytes, size) - 1)
            end = _end_of_document(file, documents)
            yield start, end
            start = end


def _end_of_document(file: BinaryIO, documents: Documents) -> int:
    """The place behind the document that the file's position is in."""
    file.readline()
    if documents == "paragraph":
        while file.readline().strip():
            pass
    return file.tell()


def read_documents(
    path: Path, start: int, end: int, *, documents: Documents, jsonl_key: str | None
) -> Iterator[str]:
    """The documents of one piece; empty ones are passed over.

    Raises BadInputError with the line, or the byte, of what cannot be read.
    """
    with path.open("rb") as file:
        file.seek(start)
        content = file.read(end - start)
    if documents == "jsonl":
        yield from _json_lines(path, start, content, jsonl_key or "text")
        return
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(
            f"{path}: byte {start + error.start}: not UTF-8; convert it, as with iconv -t utf-8"
        ) from error
    parts = [text] if documents == "file" else _paragraphs(text)
    yield from (part for part in parts if part.strip())


def _json_lines(path: Path, start: int, content: bytes, key: str) -> Iterator[str]:
    for offset, line in enumerate(content.split(b"\n")):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except ValueError as error:
            place = f"{path}:{_line_number(path, start) + offset}"
            raise BadInputError(f"{place}: not JSON ({error}); remove the line") from error
        if not isinstance(found, dict) or not isinstance(found.get(key), str):
            place = f"{path}:{_line_number(path, start) + offset}"
            raise BadInputError(f"{place}: {key}: no text; name the key that has it with --key")
        if found[key].strip():
            yield found[key]


def _line_number(path: Path, offset: int) -> int:
    """Number from 1 of the line that starts at `offset`."""
    number, left = 1, offset
    with path.open("rb") as file:
        while left > 0:
            chunk = file.read(min(left, 1024**2))
            number += chunk.count(b"\n")
            left -= len(chunk)
    return number


def _paragraphs(text: str) -> Iterator[str]:
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if line.strip():
            lines.append(line)
        elif lines:
            yield "".join(lines)
            lines = []
    if lines:
        yield "".join(lines)
