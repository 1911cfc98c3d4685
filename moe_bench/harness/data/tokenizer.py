"""Tokenizers of Megatron-Core, chosen by what a dataset or a user names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from megatron.core.tokenizers import MegatronTokenizer

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.spec.dataset import TokenizerSpec

NUM_BYTES = 256
_PAD, _END = "<pad>", "<end of document>"


@dataclass(frozen=True, slots=True)
class Tokenizer:
    """Text to token ids and back."""

    spec: TokenizerSpec
    library: Any
    """Megatron-Core's tokenizer, which its datasets want."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without an end of document."""
        ids: list[int] = self.library.tokenize(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; ends of documents, and bytes that are no UTF-8, are left out."""
        kept = [index for index in ids if index != self.spec.end_of_document]
        if self.spec.kind == "bytes":
            # the library's own strips white space behind the text
            return bytes(index for index in kept if index < NUM_BYTES).decode("utf-8", errors="ignore")
        text: str = self.library.detokenize(kept)
        return text


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, 256 for the end of a document, 257 for padding."""
    end_of_document, padding = NUM_BYTES, NUM_BYTES + 1
    library = MegatronTokenizer.from_pretrained(
        metadata_path={"library": "byte-level"},
        vocab_size=NUM_BYTES,
        # counted down from the end of the vocabulary
        special_tokens=[_PAD, _END],
        _eos_id=end_of_document,
        _pad_id=padding,
    )
    spec = TokenizerSpec(kind="bytes", vocab_size=padding + 1, end_of_document=end_of_document)
    return Tokenizer(spec, library)


def huggingface_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer whose files lie in `folder`, as a checkpoint of Hugging Face has them.

    Raises BadInputError for a folder without one or without an end of sequence, MissingRequirementError
    where transformers is not installed.
    """
    if find_spec("transformers") is None:
        raise MissingRequirementError("--tokenizer: transformers is not installed; pip install transformers")
    if not folder.is_dir():
        raise BadInputError(f"{folder}: no such folder; name the one that holds tokenizer.json")
    try:
        library = MegatronTokenizer.from_pretrained(
            tokenizer_path=str(folder), metadata_path={"library": "huggingface"}
        )
    except (ValueError, OSError, RuntimeError) as error:
        first = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise BadInputError(f"{folder}: no tokenizer can be read from it ({first})") from error
    try:
        end_of_document = int(library.eos_id)
    except TypeError as error:
        # Megatron-Core asks transformers for the number of the token None
        raise BadInputError(
            f"{folder}: its tokenizer has no end of sequence, which ends documents; add one"
        ) from error
    spec = TokenizerSpec(
        kind="huggingface",
        path=str(folder),
        fingerprint=_fingerprint(folder),
        vocab_size=int(library.vocab_size),
        end_of_document=end_of_document,
    )
    return Tokenizer(spec, library)


def tokenizer_of(spec: TokenizerSpec, *, folder: Path | None = None) -> Tokenizer:
    """The tokenizer that `spec` describes, read from `folder` where it has moved since.

    Raises BadInputError where its files are others than they were.
    """
    if spec.kind == "bytes":
        return byte_tokenizer()
    found = huggingface_tokenizer(folder or Path(spec.path or ""))
    if found.spec.fingerprint != spec.fingerprint:
        raise BadInputError(
            f"{found.spec.path}: not the files that the dataset was made with; name their folder with "
            "--tokenizer"
        )
    return found


def _fingerprint(folder: Path) -> str:
    """SHA-256 over names and contents of the files that a tokenizer is read from."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*")):
        if path.is_file() and path.suffix in (".json", ".txt", ".model", ".jinja"):
            digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()
