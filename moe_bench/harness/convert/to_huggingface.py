"""A distributed checkpoint of Megatron-Core becomes a Hugging Face checkpoint, one file after the other.

The source may have been saved under any layout. Of a stacked tensor the experts that were saved together
are read together, once, and no more of it is held.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import maybe_load_config
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from moe_bench.checkpoints.rule import Rule, Shape
from moe_bench.checkpoints.safetensors_folder import CONFIG, INDEX
from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness.adapters import FIRST, SECOND, is_adapter
from moe_bench.harness.convert.intact import MODEL_KEYS
from moe_bench.harness.convert.rearrange import to_huggingface
from moe_bench.harness.convert.unfinished import finished_folder

_NUM_HELD_STACKS = 2
"""Rules go expert by expert through both projections of a layer."""
_LAYER = re.compile(r"^(decoder\.layers\.|mtp\.layers\.)(\d+)\.(.*)$")
QUANTIZER = "_quantizer."
"""In the keys of what nvidia-modelopt adds to a checkpoint."""


class MegatronReader:
    """Parts of the global tensors of a distributed checkpoint."""

    def __init__(self, source: Path) -> None:
        if maybe_load_config(str(source)) is None:
            raise BadInputError(
                f"{source}: no metadata.json in it; name the folder of a distributed checkpoint (torch_dist)"
            )
        self._source = source
        self._files = FileSystemReader(source)
        try:
            metadata = self._files.read_metadata()
        except (OSError, EOFError, UnpicklingError) as error:
            raise BadInputError(
                f"{source}: its .metadata cannot be read ({error}); it is not whole"
            ) from error
        self._files.set_up_storage_reader(metadata, is_coordinator=True)
        self._entries: Mapping[str, Any] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._held: dict[tuple[str, Shape], tuple[range, Tensor]] = {}

    def require_match(self, rules: Sequence[Rule], *, beside: str | None = None) -> None:
        """Raise BadInputError, naming the first tensor that is missing, of another shape, or unknown.

        Keys that contain `beside` are read elsewhere.
        """
        used: dict[str, set[Shape]] = {}
        for rule in rules:
            key, leading = self._place(rule.megatron)
            used.setdefault(key, set()).add(leading)
            if key not in self._entries:
                raise BadInputError(
                    f"{self._source}: {rule.megatron}: the model has this tensor, the checkpoint does not; "
                    "name the model that it is of, and --no-mtp where it has no prediction modules"
                )
            found = tuple(self._entries[key].size)[len(leading) :]
            if found != rule.global_shape:
                raise BadInputError(
                    f"{self._source}: {rule.megatron}: shape {list(found)}, but the model says "
                    f"{list(rule.global_shape)}; name the model that it is of"
                )
        for key, places in used.items():
            size = self._entries[key].size
            if () not in places and size[0] != len(places):
                raise BadInputError(
                    f"{self._source}: {key}: of {size[0]} layers, but the model has {len(places)}; "
                    "name the model that it is of"
                )
        for key in self._entries.keys() - used.keys():
            is_beside = is_adapter(key) or (beside is not None and beside in key)
            if key.startswith(MODEL_KEYS) and not is_beside:
                if QUANTIZER in key:
                    raise BadInputError(
                        f"{self._source}: {key}: learned with quantisers, which a plain checkpoint has "
                        "no place for; write it with moe-bench quantize --export"
                    )
                raise BadInputError(
                    f"{self._source}: {key}: the checkpoint has this tensor and the model does not; "
                    "name the model that it is of"
                )

    def dtype(self, rule: Rule) -> torch.dtype:
        """Type of the tensor that the rule is of."""
        return self._entries[self._place(rule.megatron)[0]].properties.dtype

    def read(self, rule: Rule) -> Tensor:
        """The tensor of a rule, in the shape of the rule."""
        key, leading = self._place(rule.megatron)
        if rule.expert is None:
            whole = self._part(
                key, (*leading, *(0,) * len(rule.shape)), (*(1,) * len(leading), *rule.shape)
            ).view(rule.shape)
            return self._adapted(key, whole)
        place = (key, leading)
        if place not in self._held or rule.expert not in self._held[place][0]:
            self._held.pop(place, None)
            while len(self._held) >= _NUM_HELD_STACKS:
                self._held.pop(next(iter(self._held)))
            self._held[place] = self._saved_together(key, leading, rule.shape, expert=rule.expert)
        experts, stack = self._held[place]
        return stack[rule.expert - experts.start]

    def _adapted(self, key: str, weight: Tensor) -> Tensor:
        """W + B A of a weight with an adapter (arXiv:2106.09685, 4.1), added in FP32; else the weight."""
        ends = [key.removesuffix(".weight") + end for end in (FIRST, SECOND)]
        if ends[0] not in self._entries:
            return weight
        first, second = (
            self._part(end, (0, 0), tuple(self._entries[end].size)).to(torch.float32) for end in ends
        )
        return (weight.to(torch.float32) + second @ first).to(weight.dtype)

    def _place(self, key: str) -> tuple[str, Shape]:
        """The key of the global tensor, and the indices in front of it.

        A block of equal layers is saved with all of them in one tensor (transformer_block.py,
        non_homogeneous_layers), of which `key` is one.
        """
        match = _LAYER.match(key)
        if key in self._entries or match is None:
            return key, ()
        stacked = match[1] + match[3]
        return (stacked, (int(match[2]),)) if stacked in self._entries else (key, ())

    def _saved_together(self, key: str, leading: Shape, shape: Shape, *, expert: int) -> tuple[range, Tensor]:
        """The experts that one rank saved together with `expert`, each of `shape`."""
        axis = len(leading)
        ranges = (
            range(chunk.offsets[axis], chunk.offsets[axis] + chunk.sizes[axis])
            for chunk in self._entries[key].chunks
        )
        saved = next((one for one in ranges if expert in one), range(expert, expert + 1))
        offsets = (*leading, saved.start, *(0,) * len(shape))
        sizes = (*(1,) * axis, len(saved), *shape)
        return saved, self._part(key, offsets, sizes).view(len(saved), *shape)

    def _part(self, key: str, offsets: Shape, sizes: Shape) -> Tensor:
        entry = self._entries[key]
        wanted = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
        items = create_read_items_for_chunk_list(key, entry, [wanted])
        if sum(prod(item.lengths) for item in items) != prod(sizes):
            raise BadInputError(
                f"{self._source}: {key}: not all of it was saved; the checkpoint is not whole"
            )
        into = torch.empty(sizes, dtype=entry.properties.dtype)
        try:
            self._files.read_data(LoadPlan(items), _IntoOneTensor(into)).wait()
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise BadInputError(
                f"{self._source}: {key}: cannot be read ({reason}); use another copy"
            ) from error
        return into


class _IntoOneTensor(DefaultLoadPlanner):  # type: ignore[misc]
    """Puts every piece that is read into its place of one tensor."""

    def __init__(self, into: Tensor) -> None:
        super().__init__()
        self._into = into

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """The place of a piece."""
        place = tuple(
            slice(offset, offset + length)
            for offset, length in zip(read_item.dest_offsets, read_item.lengths, strict=True)
        )
        return self._into[place]

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """It is there already."""


Named = Iterator[tuple[str, Tensor]]
"""Tensors of a file by their names there."""


def plain(rule: Rule, whole: Tensor) -> Named:
    """What a Hugging Face checkpoint holds of a rule's tensor, as it is."""
    parts = to_huggingface(rule, whole)
    for named, part in zip(rule.huggingface, parts, strict=True):
        yield named.name, part
    for copy in rule.copies:
        yield copy, parts[0]


def convert_to_huggingface(
    rules: Sequence[Rule],
    reader: MegatronReader,
    target: Path,
    *,
    config: Mapping[str, Any],
    max_shard_bytes: int,
    on_tensor: Callable[[Rule], None],
    stored: Callable[[Rule, Tensor], Named] = plain,
    files: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
) -> None:
    """Write the checkpoint `target`; `on_tensor` is called after each rule.

    The rules must match what is read (`MegatronReader.require_match`). `stored` says what is written of each
    rule's tensor, and `files` what JSON lies beside. Raises BadInputError where a part of the source cannot
    be read, MissingRequirementError where the disk is full.
    """
    shards = list(_shards(rules, reader, max_shard_bytes=max_shard_bytes))
    places: dict[str, str] = {}
    num_bytes = 0
    with finished_folder(target) as folder:
        for number, group in enumerate(shards, start=1):
            file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            tensors = dict(_tensors(group, reader, stored, on_tensor))
            places |= dict.fromkeys(tensors, file)
            num_bytes += sum(tensor.nbytes for tensor in tensors.values())
            _save(tensors, folder / file, target=target)
            del tensors  # before those of the next file are made
        dtype = str(reader.dtype(rules[0])).removeprefix("torch.")
        _write_json(folder / INDEX, {"metadata": {"total_size": num_bytes}, "weight_map": places})
        for name, tree in {CONFIG: {**config, "torch_dtype": dtype}, **files}.items():
            _write_json(folder / name, tree)


def _shards(rules: Sequence[Rule], reader: MegatronReader, *, max_shard_bytes: int) -> Iterator[list[Rule]]:
    """Rules in their order, as many together as fit into one file; what one rule gives is not divided."""
    group: list[Rule] = []
    group_bytes = 0
    for rule in rules:
        rule_bytes = prod(rule.shape) * (1 + len(rule.copies)) * reader.dtype(rule).itemsize
        if group and group_bytes + rule_bytes > max_shard_bytes:
            yield group
            group, group_bytes = [], 0
        group.append(rule)
        group_bytes += rule_bytes
    yield group


def _tensors(
    rules: Sequence[Rule],
    reader: MegatronReader,
    stored: Callable[[Rule, Tensor], Named],
    on_tensor: Callable[[Rule], None],
) -> Named:
    for rule in rules:
        for name, tensor in stored(rule, reader.read(rule)):
            # a file holds no views: each tensor has memory of its own
            yield name, tensor.clone(memory_format=torch.contiguous_format)
        on_tensor(rule)


def _save(tensors: dict[str, Tensor], path: Path, *, target: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # which says only in words what the system said
        raise MissingRequirementError(f"{target}: {error}; nothing of it was kept") from error


def _write_json(path: Path, tree: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
