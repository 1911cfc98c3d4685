"""A Hugging Face tokenizer from its folder: trained here on a few words, read back, and told from another."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.errors import BadInputError
from moe_bench.harness.data.tokenizer import huggingface_tokenizer, tokenizer_of

pytest.importorskip("transformers")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return made(tmp_path / "tokenizer", end="<end>")


def made(folder: Path, *, end: str | None) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    words.train_from_iterator(
        ["a mixture of experts"],
        trainers.BpeTrainer(vocab_size=280, special_tokens=["<end>"], initial_alphabet=alphabet),
    )
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token=end).save_pretrained(str(folder))
    return folder


def test_its_folder_is_all_it_needs_and_it_is_known_again(folder: Path) -> None:
    tokenizer = huggingface_tokenizer(folder)
    assert tokenizer.spec.end_of_document == 0
    assert max(tokenizer.encode("a mixture of experts")) < tokenizer.spec.vocab_size
    assert tokenizer_of(tokenizer.spec).spec == tokenizer.spec
    moved = folder.rename(folder.with_name("moved"))
    assert tokenizer_of(tokenizer.spec, folder=moved).spec.fingerprint == tokenizer.spec.fingerprint


def test_another_tokenizer_in_its_place_is_refused(folder: Path) -> None:
    spec = huggingface_tokenizer(folder).spec
    path = folder / "tokenizer_config.json"
    path.write_text(path.read_text().replace("<end>", "<other>"))
    with pytest.raises(BadInputError, match="not the files that the dataset was made with"):
        tokenizer_of(spec)


def test_what_is_no_tokenizer_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="no such folder"):
        huggingface_tokenizer(tmp_path / "missing")
    with pytest.raises(BadInputError, match="no end of sequence"):
        huggingface_tokenizer(made(tmp_path / "endless", end=None))
    (tmp_path / "endless" / "tokenizer.json").write_text("{")
    with pytest.raises(BadInputError, match="no tokenizer can be read") as caught:
        huggingface_tokenizer(tmp_path / "endless")
    assert "\n" not in str(caught.value)
