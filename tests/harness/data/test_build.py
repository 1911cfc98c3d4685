"""A dataset read back by Megatron-Core, gone on with after a kill, and what is left where none is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

from moe_bench.errors import BadInputError, MeasurementError
from moe_bench.harness.data.build import Wish, build_dataset, read_manifest
from moe_bench.harness.data.tokenizer import Tokenizer, byte_tokenizer
from moe_bench.spec.dataset import TokenizerSpec

pytestmark = pytest.mark.filterwarnings("ignore:Could not determine rank")

TEXTS = ["one", "zwei €", "", "a third, longer one"]
END = 256


@pytest.fixture
def tokenizer() -> Tokenizer:
    return byte_tokenizer()


@pytest.fixture
def wish(tmp_path: Path) -> Wish:
    paths = (tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    for path, texts in zip(paths, (TEXTS, TEXTS[::-1]), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return Wish(inputs=paths, prefix=tmp_path / "set", documents="jsonl", jsonl_key="text", piece_bytes=1)


def ignore(done: int, total: int) -> None:
    """Nobody watches."""


def documents(prefix: Path) -> list[list[int]]:
    return [list(map(int, document)) for document in IndexedDataset(str(prefix))]


EXPECTED = [[*text.encode(), END] for text in (*TEXTS, *TEXTS[::-1]) if text]


def test_megatron_core_reads_the_documents_of_all_files_in_order(wish: Wish, tokenizer: Tokenizer) -> None:
    manifest = build_dataset(wish, tokenizer, on_bytes=ignore)
    assert documents(wish.prefix) == EXPECTED
    assert (manifest.num_documents, manifest.num_tokens) == (6, sum(map(len, EXPECTED)))
    assert read_manifest(wish.prefix) == manifest
    assert {path.name for path in wish.prefix.parent.iterdir()} == {
        "a.jsonl", "b.jsonl", "set.bin", "set.idx", "set.json",
    }  # fmt: skip


class KilledError(Exception):
    """Somebody pulled the plug."""


def test_what_was_killed_goes_on_and_makes_no_piece_twice(
    wish: Wish, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[str] = []
    plain = Tokenizer.encode

    def encode(self: Tokenizer, text: str) -> list[int]:
        encoded.append(text)
        return plain(self, text)

    def killed(done: int, total: int) -> None:
        if done > total / 2:
            raise KilledError

    monkeypatch.setattr(Tokenizer, "encode", encode)
    with pytest.raises(KilledError):
        build_dataset(wish, tokenizer, on_bytes=killed)
    assert not Path(f"{wish.prefix}.bin").exists()
    build_dataset(wish, tokenizer, on_bytes=ignore)
    assert documents(wish.prefix) == EXPECTED
    assert encoded == [text for text in (*TEXTS, *TEXTS[::-1]) if text]


def test_a_build_of_something_else_does_not_go_on_with_it(wish: Wish, tokenizer: Tokenizer) -> None:
    def killed(done: int, total: int) -> None:
        if done:
            raise KilledError

    with pytest.raises(KilledError):
        build_dataset(wish, tokenizer, on_bytes=killed)
    wish.inputs[1].write_text('{"text": "changed"}\n')
    with pytest.raises(BadInputError, match=r"sources: .*remove .*set\.pieces to start afresh"):
        build_dataset(wish, tokenizer, on_bytes=ignore)


def test_a_full_disk_ends_in_one_line_and_loses_nothing(
    wish: Wish, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: IndexedDatasetBuilder, path: str) -> None:
        raise OSError(28, "No space left on device", path)

    with monkeypatch.context() as patch:
        patch.setattr(IndexedDatasetBuilder, "add_index", full)
        with pytest.raises(MeasurementError, match="No space left on device; what is done is kept"):
            build_dataset(wish, tokenizer, on_bytes=ignore)
    assert not Path(f"{wish.prefix}.bin").exists()
    build_dataset(wish, tokenizer, on_bytes=ignore)
    assert documents(wish.prefix) == EXPECTED


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_dataset_whose_files_are_not_whole_is_refused(
    wish: Wish, tokenizer: Tokenizer, suffix: str, damage: str
) -> None:
    assert build_dataset(wish, tokenizer, on_bytes=ignore) == read_manifest(wish.prefix)
    path = wish.prefix.with_name(f"{wish.prefix.name}{suffix}")
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadInputError, match=rf"{suffix}: [\d,]+ of [\d,]+ bytes"):
        read_manifest(wish.prefix)


def test_nothing_is_built_of_nothing_and_nothing_over_something(wish: Wish, tokenizer: Tokenizer) -> None:
    empty = Wish(
        inputs=(wish.prefix.with_name("empty.txt"),), prefix=wish.prefix, documents="file", jsonl_key=None
    )
    with pytest.raises(BadInputError, match="no such file"):
        build_dataset(empty, tokenizer, on_bytes=ignore)
    empty.inputs[0].write_text(" \n")
    with pytest.raises(BadInputError, match=r"empty\.txt: no text in it"):
        build_dataset(empty, tokenizer, on_bytes=ignore)
    build_dataset(wish, tokenizer, on_bytes=ignore)
    with pytest.raises(BadInputError, match=r"set\.json: a dataset of this name exists"):
        build_dataset(wish, tokenizer, on_bytes=ignore)
    with pytest.raises(BadInputError, match=r"build one with moe-bench data build"):
        read_manifest(wish.prefix.with_name("other"))


def test_bytes_come_back_as_text(tokenizer: Tokenizer) -> None:
    text = "  white space, é and 漢字 \n"
    ids = tokenizer.encode(text)
    assert ids == list(text.encode())
    assert tokenizer.decode([*ids, END]) == text
    assert tokenizer.spec == TokenizerSpec(kind="bytes", vocab_size=258, end_of_document=END)
    assert tokenizer.library.eod == END
