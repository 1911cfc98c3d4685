"""Builds Megatron-Core's indexed dataset from text, piece by piece, so that what was killed can go on."""

from __future__ import annotations

import contextlib
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy
from megatron.core.datasets.indexed_dataset import (
    DType,
    IndexedDatasetBuilder,
    get_bin_path,
    get_idx_path,
)
from pydantic import TypeAdapter

from moe_bench.errors import BadInputError, MeasurementError
from moe_bench.harness.data.documents import PIECE_BYTES, pieces, read_documents
from moe_bench.harness.data.tokenizer import Tokenizer
from moe_bench.results.journal import (
    LineJournal,
    begin_journal,
    read_journal,
    require_alike,
    unfinished_journals,
)
from moe_bench.spec.base import NonNegativeInt, Spec
from moe_bench.spec.dataset import (
    MANIFEST_SUFFIX,
    DatasetManifest,
    Documents,
    SourceFile,
    TokenizerSpec,
)

_COMMAND = "data build"


class BuildHeader(Spec):
    """First line of the journal: what is built."""

    journal_version: Literal[1] = 1
    tokenizer: TokenizerSpec
    documents: Documents
    jsonl_key: str | None
    sources: tuple[SourceFile, ...]
    piece_bytes: NonNegativeInt


class Piece(Spec):
    """One that is on disk."""

    source: NonNegativeInt
    """Which of the header's sources it is of."""
    start: NonNegativeInt
    end: NonNegativeInt
    num_documents: NonNegativeInt
    num_tokens: NonNegativeInt


_PIECES = TypeAdapter(Piece)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What a user asks for."""

    inputs: tuple[Path, ...]
    prefix: Path
    """The dataset becomes `<prefix>.bin`, `<prefix>.idx` and `<prefix>.json`."""
    documents: Documents
    jsonl_key: str | None
    piece_bytes: int = PIECE_BYTES


def build_dataset(
    wish: Wish, tokenizer: Tokenizer, *, on_bytes: Callable[[int, int], None]
) -> DatasetManifest:
    """Tokenize the inputs and write the dataset; pieces of a build that was killed are not made again.

    `on_bytes` is told how many bytes of how many are done. No file has its final name before it is whole,
    and the manifest comes last.

    Raises BadInputError for inputs that are missing, unreadable or empty, and where `prefix` is taken;
    MeasurementError where the disk is full.
    """
    _require_free(wish)
    folder = Path(f"{wish.prefix}.pieces")
    with warnings.catch_warnings():
        # Megatron-Core wonders about its rank, of which one process has none
        warnings.filterwarnings("ignore", message="Could not determine rank")
        return _built(wish, folder, tokenizer, on_bytes)


def _built(
    wish: Wish, folder: Path, tokenizer: Tokenizer, on_bytes: Callable[[int, int], None]
) -> DatasetManifest:
    try:
        journal = _journal(folder, _header(wish, tokenizer.spec))
        _tokenize(journal, folder, tokenizer, on_bytes)
        if not any(piece.num_documents for piece in journal.entries):
            shutil.rmtree(folder)
            names = ", ".join(str(path) for path in wish.inputs)
            raise BadInputError(f"{names}: no text in it; name files that have some")
        manifest = _manifest(journal)
        _merge(journal, folder, wish.prefix, tokenizer.spec)
        _put(wish.prefix, manifest)
    except OSError as error:
        raise MeasurementError(
            f"{error.filename or folder}: {error.strerror}; what is done is kept: make room and run the same "
            "command again"
        ) from error
    shutil.rmtree(folder)
    return manifest


def _require_free(wish: Wish) -> None:
    for path in wish.inputs:
        if not path.is_file():
            raise BadInputError(f"{path}: no such file; name files of text or of JSON lines")
    taken = _manifest_path(wish.prefix)
    if taken.exists():
        raise BadInputError(f"{taken}: a dataset of this name exists; remove it, or name another with --out")


def _header(wish: Wish, tokenizer: TokenizerSpec) -> BuildHeader:
    return BuildHeader(
        tokenizer=tokenizer,
        documents=wish.documents,
        jsonl_key=wish.jsonl_key,
        sources=tuple(
            SourceFile(path=str(path), num_bytes=path.stat().st_size, modified_ns=path.stat().st_mtime_ns)
            for path in wish.inputs
        ),
        piece_bytes=wish.piece_bytes,
    )


def _journal(folder: Path, header: BuildHeader) -> LineJournal[BuildHeader, Piece]:
    """That of a build of the same that was killed, or a new one.

    Raises BadInputError where another build was begun here.
    """
    begun = unfinished_journals(folder)
    if not begun:
        return LineJournal(begin_journal(folder, "build", header), header)
    then, done = read_journal(begun[-1], BuildHeader, _PIECES, command=_COMMAND)
    require_alike(
        begun[-1],
        [(name, getattr(then, name), getattr(header, name)) for name in BuildHeader.model_fields],
        remedy=f"remove {folder} to start afresh",
    )
    return LineJournal(begun[-1], header, done)


def _tokenize(
    journal: LineJournal[BuildHeader, Piece],
    folder: Path,
    tokenizer: Tokenizer,
    on_bytes: Callable[[int, int], None],
) -> None:
    """Write every piece that the journal does not have."""
    header = journal.header
    total = sum(source.num_bytes for source in header.sources)
    done = {(piece.source, piece.start) for piece in journal.entries}
    num_done = sum(piece.end - piece.start for piece in journal.entries)
    on_bytes(num_done, total)
    for index, source in enumerate(header.sources):
        path = Path(source.path)
        for start, end in pieces(path, header.documents, piece_bytes=header.piece_bytes):
            if (index, start) in done:
                continue
            texts = read_documents(path, start, end, documents=header.documents, jsonl_key=header.jsonl_key)
            num_documents, num_tokens = _write_piece(_prefix(folder, index, start), texts, tokenizer)
            journal.append(
                Piece(source=index, start=start, end=end, num_documents=num_documents, num_tokens=num_tokens)
            )
            num_done += end - start
            on_bytes(num_done, total)


def _write_piece(prefix: str, texts: Iterator[str], tokenizer: Tokenizer) -> tuple[int, int]:
    """Numbers of documents and of tokens."""
    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=_dtype(tokenizer.spec))
    num_documents = num_tokens = 0
    with contextlib.closing(builder.data_file):
        for text in texts:
            ids = [*tokenizer.encode(text), tokenizer.spec.end_of_document]
            builder.add_document(ids, [len(ids)])
            num_documents += 1
            num_tokens += len(ids)
        builder.finalize(get_idx_path(prefix))
    return num_documents, num_tokens


def _dtype(tokenizer: TokenizerSpec) -> type[numpy.number]:
    """Two bytes per token where the vocabulary allows it, as Megatron-Core's datasets expect."""
    return DType.optimal_dtype(tokenizer.vocab_size)


def _prefix(folder: Path, source: int, start: int) -> str:
    return str(folder / f"{source:05d}-{start:015d}")


def _merge(
    journal: LineJournal[BuildHeader, Piece], folder: Path, prefix: Path, tokenizer: TokenizerSpec
) -> None:
    """One dataset of all pieces in the order of the sources."""
    whole = folder / "whole"
    builder = IndexedDatasetBuilder(get_bin_path(str(whole)), dtype=_dtype(tokenizer))
    with contextlib.closing(builder.data_file):
        for piece in _ordered(journal.entries):
            if piece.num_documents:
                builder.add_index(_prefix(folder, piece.source, piece.start))
        builder.finalize(get_idx_path(str(whole)))
    for name in (get_bin_path, get_idx_path):
        made = Path(name(str(whole)))
        _flush(made)
        made.replace(name(str(prefix)))


def _ordered(done: Sequence[Piece]) -> list[Piece]:
    return sorted(done, key=lambda piece: (piece.source, piece.start))


def _manifest(journal: LineJournal[BuildHeader, Piece]) -> DatasetManifest:
    header = journal.header
    return DatasetManifest(
        tokenizer=header.tokenizer,
        documents=header.documents,
        jsonl_key=header.jsonl_key,
        sources=header.sources,
        num_documents=sum(piece.num_documents for piece in journal.entries),
        num_tokens=sum(piece.num_tokens for piece in journal.entries),
    )


def _manifest_path(prefix: Path) -> Path:
    return Path(f"{prefix}{MANIFEST_SUFFIX}")


def _put(prefix: Path, manifest: DatasetManifest) -> None:
    final = _manifest_path(prefix)
    unfinished = final.with_name(f".{final.name}")
    unfinished.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")
    _flush(unfinished)
    unfinished.replace(final)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def read_manifest(prefix: Path) -> DatasetManifest:
    """The manifest of the dataset `<prefix>`; BadInputError where there is none, or one that is not whole."""
    path = _manifest_path(prefix)
    if not path.is_file():
        raise BadInputError(f"{path}: no dataset; build one with moe-bench data build FILE --out {prefix}")
    try:
        manifest = DatasetManifest.model_validate_json(path.read_bytes())
    except ValueError as error:
        raise BadInputError(f"{path}: not the manifest of a dataset; build it again") from error
    for file, num_bytes in _sizes(prefix, manifest).items():
        found = file.stat().st_size if file.is_file() else 0
        if found != num_bytes:
            raise BadInputError(
                f"{file}: {found:,} of {num_bytes:,} bytes; remove {path}, and build it again"
            )
    return manifest


def _sizes(prefix: Path, manifest: DatasetManifest) -> dict[Path, int]:
    """Bytes of both files of a dataset whose documents are one sequence each.

    The index is a header of 34 bytes, lengths of four bytes, places of eight, and where documents begin and
    the last ends, of eight each (indexed_dataset.py, _IndexWriter).
    """
    num_documents = manifest.num_documents
    return {
        Path(get_bin_path(str(prefix))): manifest.num_tokens * DType.size(_dtype(manifest.tokenizer)),
        Path(get_idx_path(str(prefix))): 34 + (4 + 8) * num_documents + 8 * (num_documents + 1),
    }
