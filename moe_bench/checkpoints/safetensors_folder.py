"""What a folder of Hugging Face's safetensors holds, from headers alone, and whether every file is whole.

The format: 8 bytes with the length of the header, the header as JSON, the tensors behind one another
(github.com/huggingface/safetensors, README). Nothing is loaded here, so that a damaged or foreign checkpoint
is refused, by the name of a tensor, before anything is converted.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_bench.checkpoints.rule import Rule, Shape
from moe_bench.errors import BadInputError

INDEX = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG = "config.json"
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
"""As in the safetensors library: a longer one is no header."""
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
"""Of buffers that old checkpoints hold and every class computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor in a file."""

    name: str
    path: Path
    dtype: str
    """As safetensors spells it: `BF16`, `F32`, `F8_E4M3`, `U8`."""
    shape: Shape
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Logical:
    """A tensor as the model has it, with the stored ones that it is read from."""

    shape: Shape
    dtype: str
    stored: tuple[Stored, ...]
    """One; or quantised values and their scales."""


def logical_tensors(folder: Path) -> Mapping[str, Logical]:
    """Every tensor below `folder` by its name in the model, in the order of the files.

    Quantised ones appear under the name of what they stand for: FP8 in blocks of 128 x 128 with
    `<name>_scale_inv` (DeepSeek-V3), MXFP4 as `<name>_blocks` with `<name>_scales` (GPT-OSS).
    Raises BadInputError, naming the tensor, for a file that is missing, cut off or no safetensors file.
    """
    places = _places(folder)
    paths = [folder / file for file in sorted(set(places.values()))] or [folder / SINGLE_FILE]
    stored = {tensor.name: tensor for path in paths for tensor in _header(path)}
    for name, file in places.items():
        if name not in stored:
            raise BadInputError(f"{folder / file}: {name} is not in it, as {INDEX} says; download both again")
    found: dict[str, Logical] = {}
    for name, tensor in stored.items():
        if name.endswith("_scale_inv") or name.endswith(IGNORED_SUFFIXES):
            continue
        if name.endswith("_scales") and name.removesuffix("scales") + "blocks" in stored:
            continue
        if name.endswith("_blocks"):
            found[name.removesuffix("_blocks")] = _mxfp4(tensor, stored)
        elif tensor.dtype.startswith("F8"):
            parts = (tensor, _partner(tensor, f"{name}_scale_inv", stored))
            found[name] = Logical(shape=tensor.shape, dtype="BF16", stored=parts)
        else:
            found[name] = Logical(shape=tensor.shape, dtype=tensor.dtype, stored=(tensor,))
    return found


def require_match(found: Mapping[str, Logical], rules: Iterable[Rule], *, folder: Path) -> None:
    """Raise BadInputError, naming it, for a tensor that either side lacks or has in another shape."""
    copies: set[str] = set()
    wanted: set[str] = set()
    for rule in rules:
        copies.update(rule.copies)
        for named in rule.huggingface:
            wanted.add(named.name)
            tensor = found.get(named.name)
            if tensor is None:
                raise BadInputError(
                    f"{folder}: {named.name}: the model has this tensor and the checkpoint does not; "
                    "name the model that it is of, and --no-mtp where it has no prediction modules"
                )
            if tensor.shape != named.shape:
                raise BadInputError(
                    f"{folder}: {named.name}: shape {list(tensor.shape)}, but the model says "
                    f"{list(named.shape)}; name the model that it is of"
                )
    for name in found.keys() - wanted - copies:
        raise BadInputError(
            f"{folder}: {name}: the checkpoint has this tensor and the model does not; "
            "name the model that it is of"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of `folder`; BadInputError where there is none."""
    return _json(folder / CONFIG, "no checkpoint of Hugging Face without it; name its folder")


def _places(folder: Path) -> Mapping[str, str]:
    """The file of each tensor as the index has it, all of which are there; empty for a single file."""
    if (folder / SINGLE_FILE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        raise BadInputError(f"{folder}: neither {SINGLE_FILE} nor {INDEX} in it; name a checkpoint's folder")
    places: dict[str, str] = _json(folder / INDEX, "download it again").get("weight_map", {})
    missing = {file for file in set(places.values()) if not (folder / file).is_file()}
    for name, file in places.items():
        if file in missing:
            raise BadInputError(f"{folder / file}: missing, {name} is in it; download it")
    return places


def _json(path: Path, fix: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInputError(f"{path}: {error.strerror}; {fix}") from error
    except ValueError as error:
        raise BadInputError(f"{path}: not JSON ({error}); {fix}") from error
    if not isinstance(tree, dict):
        raise BadInputError(f"{path}: not a JSON object; {fix}")
    return tree


def _header(path: Path) -> list[Stored]:
    """The tensors of a file, in the order in which they lie in it."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
        text = file.read(length) if length <= _MAX_HEADER_BYTES else b""
    try:
        entries: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise BadInputError(f"{path}: cut off within its header, or no safetensors; download it") from error
    begin = _LENGTH_BYTES + length
    tensors = []
    for name, entry in sorted(_tensors_of(entries).items(), key=lambda pair: pair[1]["data_offsets"]):
        start, end = entry["data_offsets"]
        if begin + end > size:
            raise BadInputError(
                f"{path}: {name}: cut off, it ends at byte {begin + end} of {size}; download the file again"
            )
        tensors.append(
            Stored(
                name=name,
                path=path,
                dtype=entry["dtype"],
                shape=tuple(entry["shape"]),
                num_bytes=end - start,
            )
        )
    return tensors


def _tensors_of(entries: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in entries.items() if name != "__metadata__"}


def _partner(tensor: Stored, name: str, stored: Mapping[str, Stored]) -> Stored:
    if name not in stored:
        raise BadInputError(
            f"{tensor.path}: {tensor.name}: quantised, and {name} is not there; download both"
        )
    return stored[name]


def _mxfp4(blocks: Stored, stored: Mapping[str, Stored]) -> Logical:
    """[experts, out, groups, 16 bytes of two values] stand for [experts, 32 groups, out]."""
    scales = _partner(blocks, f"{blocks.name.removesuffix('blocks')}scales", stored)
    experts, out, groups, num_bytes = blocks.shape
    return Logical(shape=(experts, groups * num_bytes * 2, out), dtype="BF16", stored=(blocks, scales))
