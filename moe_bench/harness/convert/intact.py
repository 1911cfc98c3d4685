"""Whether the files of a distributed checkpoint are those that were saved, by the hashes beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from megatron.core.dist_checkpointing.validation import INTEGRITY_FNAME
from torch.distributed.checkpoint import FileSystemReader

from moe_bench.errors import BadInputError

MODEL_KEYS = ("embedding.", "decoder.", "mtp.", "output_layer.")
"""How the keys of a model's own tensors begin; the optimizer's begin otherwise."""


def require_intact(source: Path) -> None:
    """Raise BadInputError, naming a tensor, for a file of `source` that is not what was saved.

    Read are SHA-256 of all files, as Megatron-Core writes them (dist_checkpointing/validation.py,
    save_integrity_manifest) for `train` and `convert`; other checkpoints without them are not looked at.
    """
    manifest = source / INTEGRITY_FNAME
    if not manifest.is_file():
        return
    try:
        hashes = json.loads(manifest.read_bytes())["files"].items()
    except (ValueError, KeyError, AttributeError) as error:
        raise BadInputError(f"{manifest}: not the hashes of a checkpoint; use another copy") from error
    for name, saved in hashes:
        if _sha256(source / name) != saved:
            tensors = sorted(_tensors_in(source, name))
            what = f"{tensors[0]} and {len(tensors) - 1} other tensors are in it; " if tensors else ""
            raise BadInputError(f"{source / name}: not what was saved (SHA-256); {what}use another copy")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BadInputError(f"{path}: cannot be read ({error.strerror}); use another copy") from error


def _tensors_in(source: Path, name: str) -> Iterator[str]:
    """Keys of the model's tensors of which a file has a part."""
    if name.startswith("."):  # the list of them itself
        return
    for index, place in FileSystemReader(source).read_metadata().storage_data.items():
        if place.relative_path == name and index.fqn.startswith(MODEL_KEYS):
            yield index.fqn
