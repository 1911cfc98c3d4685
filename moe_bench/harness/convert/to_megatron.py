"""A Hugging Face checkpoint becomes a distributed checkpoint of Megatron-Core, file by file.

Every file of the source becomes one of the target. Tensors are read when they are written, one after the
other, through torch's own writer of distributed checkpoints, which takes each file as if a rank wrote it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.validation import save_integrity_manifest
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from moe_bench.checkpoints.rule import Rule
from moe_bench.checkpoints.safetensors_folder import Logical
from moe_bench.errors import BadInputError
from moe_bench.harness.convert.rearrange import to_megatron
from moe_bench.harness.convert.stored import TensorReader, tensor_reader
from moe_bench.harness.convert.unfinished import finished_folder

_TYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
COMMON_STATE: Mapping[str, Any] = {"num_steps": 0}
"""What the checkpoint holds besides tensors: no step has been taken here."""
_COMMON_KEY = ShardedObject("common_state", None, (1,), (0,)).unique_key
_LINEAR_NAMES = ("linear_", "eh_proj")


class _LazyPlanner(DefaultSavePlanner):  # type: ignore[misc]
    """Makes each tensor when the writer asks for it."""

    def __init__(
        self, rules: Mapping[MetadataIndex, Rule], reader: TensorReader, on_tensor: Callable[[Rule], None]
    ) -> None:
        super().__init__()
        self._rules, self._reader, self._on_tensor = rules, reader, on_tensor

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        """The tensor of a rule, with the axis of experts in front where it is one of them; or the rest."""
        if write_item.type == WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([dict(COMMON_STATE) if write_item.index.fqn == _COMMON_KEY else None], data)
            return data
        rule = self._rules[write_item.index]
        whole = to_megatron(rule, [self._reader.read(named.name) for named in rule.huggingface])
        self._on_tensor(rule)
        return (whole if rule.expert is None else whole.unsqueeze(0)).contiguous()


def convert_to_megatron(
    rules: Sequence[Rule],
    tensors: Mapping[str, Logical],
    target: Path,
    *,
    on_tensor: Callable[[Rule], None],
) -> None:
    """Write the checkpoint `target` of what `tensors` hold; `on_tensor` is called after each rule.

    The rules must match the tensors (`safetensors_folder.require_match`). Raises BadInputError where tensors
    that belong together have several types, or what should be a copy differs; MissingRequirementError where
    the disk is full.
    """
    types = _types(rules, tensors)
    items = {rule.label: _write_item(rule, types[rule.megatron]) for rule in rules}
    with finished_folder(target) as folder, tensor_reader(tensors) as reader:
        _require_equal_copies(rules, tensors, reader)
        planner = _LazyPlanner({items[rule.label].index: rule for rule in rules}, reader, on_tensor)
        writer = FileSystemWriter(folder, thread_count=1)
        plans = [SavePlan([items[rule.label] for rule in group]) for group in _by_file(rules, tensors)]
        objects = [_object_item(key) for key in (_COMMON_KEY, *_extra_states(rules))]
        plans.append(SavePlan(objects))
        results = []
        for plan in writer.prepare_global_plan(plans):
            results.append(writer.write_data(plan, planner).value())
            reader.close_all()
        writer.finish(_metadata((*items.values(), *objects)), results)
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        save_integrity_manifest(str(folder))


def _by_file(rules: Sequence[Rule], tensors: Mapping[str, Logical]) -> list[list[Rule]]:
    """Rules by the last of the files that they need, in the order of the files."""
    groups: dict[Path, list[Rule]] = {}
    for rule in rules:
        last = max(stored.path for named in rule.huggingface for stored in tensors[named.name].stored)
        groups.setdefault(last, []).append(rule)
    return [groups[path] for path in sorted(groups)]


def _types(rules: Iterable[Rule], tensors: Mapping[str, Logical]) -> dict[str, torch.dtype]:
    """The type of each key; BadInputError where what it is made of has several, or one of no use."""
    types: dict[str, str] = {}
    for rule in rules:
        for named in rule.huggingface:
            dtype = tensors[named.name].dtype
            if dtype not in _TYPES:
                raise BadInputError(f"{named.name}: {dtype}: not converted; save it in BF16 or FP32")
            if types.setdefault(rule.megatron, dtype) != dtype:
                raise BadInputError(
                    f"{named.name}: {dtype}, others of {rule.megatron} are {types[rule.megatron]}; "
                    "save them as one"
                )
    return {key: _TYPES[dtype] for key, dtype in types.items()}


def _require_equal_copies(
    rules: Iterable[Rule], tensors: Mapping[str, Logical], reader: TensorReader
) -> None:
    """A tensor that is stored twice is the same both times: the target holds it once."""
    for rule in rules:
        for copy in rule.copies:
            (named,) = rule.huggingface
            if copy in tensors and not torch.equal(reader.read(copy), reader.read(named.name)):
                raise BadInputError(
                    f"{copy}: differs from {named.name}, which the model shares with it; "
                    "the checkpoint is not of this model"
                )
    reader.close_all()


def _write_item(rule: Rule, dtype: torch.dtype) -> WriteItem:
    offsets = (0,) * len(rule.shape) if rule.expert is None else (rule.expert, *(0,) * len(rule.shape))
    sizes = rule.shape if rule.expert is None else (1, *rule.shape)
    chunk = ChunkStorageMetadata(offsets=torch.Size(offsets), sizes=torch.Size(sizes))
    return WriteItem(
        index=MetadataIndex(rule.megatron, offsets, rule.expert or 0),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=chunk, properties=TensorProperties(dtype=dtype), size=torch.Size(rule.global_shape)
        ),
    )


def _extra_states(rules: Iterable[Rule]) -> Iterator[str]:
    """Keys of the empty state that linear layers and attention ask for beside their weights.

    Megatron-Core's own linear layers (tensor_parallel/layers.py, get_extra_state) and Transformer Engine's,
    of grouped ones one for each expert (extensions/transformer_engine.py, TEGroupedLinear).
    """
    for rule in rules:
        module, _, kind = rule.megatron.rpartition(".")
        if kind != "weight" or not module.rpartition(".")[2].startswith(_LINEAR_NAMES):
            continue
        is_stack = rule.expert is None and ".experts.experts." in module
        places = range(rule.shape[0]) if is_stack else (rule.expert or 0,)
        size = rule.shape[0] if is_stack else rule.num_experts or 1
        for place in places:
            yield ShardedObject(f"{module}._extra_state", None, (size,), (place,)).unique_key
        if module.endswith("self_attention.linear_proj"):
            core = module.removesuffix("linear_proj") + "core_attention._extra_state"
            yield ShardedObject(core, None, (1,), (0,)).unique_key


def _object_item(key: str) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(key), type=WriteItemType.BYTE_IO, bytes_io_data=BytesIOWriteData(nbytes=0)
    )


def _metadata(items: Iterable[WriteItem]) -> Metadata:
    entries: dict[str, Any] = {}
    for item in items:
        data = item.tensor_data
        if data is None:
            entries[item.index.fqn] = BytesStorageMetadata()
            continue
        entry = entries.setdefault(
            item.index.fqn,
            TensorStorageMetadata(properties=data.properties, size=data.size, chunks=[]),
        )
        entry.chunks.append(data.chunk)
    return Metadata(state_dict_metadata=entries, planner_data={})
