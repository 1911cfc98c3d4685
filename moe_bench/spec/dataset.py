"""A dataset of token ids on disk: what it was made of, and which tokenizer made it."""

from __future__ import annotations

from typing import Literal

from moe_bench.spec.base import NonNegativeInt, PositiveInt, Spec, Text

MANIFEST_SUFFIX = ".json"
"""Of the file beside `<prefix>.bin` and `<prefix>.idx`; written last, so where it is the dataset is whole."""

Documents = Literal["jsonl", "file", "paragraph"]
"""What one document is: a line of JSON, a file of text, or a paragraph, which ends at an empty line."""


class TokenizerSpec(Spec):
    """How text becomes token ids."""

    kind: Literal["bytes", "huggingface"]
    """`bytes`: a token for each byte of UTF-8 and one for the end of a document."""
    path: Text | None = None
    """Folder of the tokenizer's files, for `huggingface`."""
    fingerprint: Text | None = None
    """SHA-256 over the files of that folder; null for `bytes`."""
    vocab_size: PositiveInt
    end_of_document: NonNegativeInt
    """Token that follows every document."""

    def is_same_as(self, other: TokenizerSpec) -> bool:
        """Whether both make the same tokens of a text; where their files lie does not matter."""
        return self.model_copy(update={"path": None}) == other.model_copy(update={"path": None})


class SourceFile(Spec):
    """One file that documents were read from."""

    path: Text
    num_bytes: NonNegativeInt
    modified_ns: NonNegativeInt
    """Unix time of the last change."""


class DatasetManifest(Spec):
    """Everything that is known of a dataset beside its tokens."""

    schema_version: Literal[1] = 1
    tokenizer: TokenizerSpec
    documents: Documents
    jsonl_key: Text | None
    """Key of the text in each line, for `jsonl`."""
    sources: tuple[SourceFile, ...]
    num_documents: PositiveInt
    num_tokens: PositiveInt
    """With the token behind each document."""
