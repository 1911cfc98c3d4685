"""Expert weights, stacked or apart, as the global tensors of Megatron-Core's distributed checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

if TYPE_CHECKING:
    from moe_bench.harness.kernels.experts import ExpertStack

_EXPERT_AXIS = 0
_OUT_AXIS = 1
_IN_AXIS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertShards:
    """Where this rank's experts stand among all of them."""

    ep_rank: int
    ep_size: int
    tp_rank: int
    tp_size: int
    dp_rank: int
    leading: tuple[tuple[int, int, int], ...]
    """Megatron-Core's (axis, fragment, fragments) of the axes in front, such as the layer's."""

    def fragment(self, axis: int, rank: int, size: int) -> tuple[int, int, int]:
        """Megatron-Core's description of fragment `rank` of `size` along `axis` of the stacked tensor."""
        return (len(self.leading) + axis, rank, size)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """Where a parameter stands in the global tensor [leading axes, experts, out, in]."""

    leading: tuple[tuple[int, int, int], ...]
    """Fragments of the axes in front of those of the parameter."""
    own: tuple[tuple[int, int, int], ...]
    """Its fragment of the expert axis, where it has one."""
    out_axis: int
    """Of the parameter."""


def sharded_parameters(stack: ExpertStack, name: str, prefix: str, shards: ExpertShards) -> dict[str, Any]:
    """Describe one projection's parameters: keys and global shapes are those of SequentialMLP.

    SequentialMLP writes one tensor per expert into a global tensor [experts, out, in]; a stack is a range of
    it, and a weight of one expert a slice.
    """
    tensors: dict[str, Any] = {}
    for local_name, parameter in stack.named_parameters():
        kind = local_name.rstrip("0123456789")
        key = f"{prefix}experts.{name}.{kind}"
        tp_axis = _tp_axis(stack, kind)
        halved = stack.shape.has_gate and shards.tp_size > 1
        describe = _halved if halved else _whole
        place = _place(stack, local_name.removeprefix(kind), shards)
        tensors[f"{prefix}{name}.{local_name}"] = describe(key, parameter, tp_axis, place, shards)
    return tensors


def _place(stack: ExpertStack, expert: str, shards: ExpertShards) -> _Place:
    if not stack.are_apart:
        own = shards.fragment(_EXPERT_AXIS, shards.ep_rank, shards.ep_size)
        return _Place(leading=shards.leading, own=(own,), out_axis=_OUT_AXIS)
    index = shards.ep_rank * stack.num_experts + int(expert)
    slice_ = shards.fragment(_EXPERT_AXIS, index, shards.ep_size * stack.num_experts)
    return _Place(leading=(*shards.leading, slice_), own=(), out_axis=_OUT_AXIS - 1)


def _tp_axis(stack: ExpertStack, kind: str) -> int | None:
    """Axis that expert tensor parallelism cuts; the bias of a projection cut by its inputs is whole."""
    if stack.shape.split == "out":
        return _OUT_AXIS
    return _IN_AXIS if kind == "weight" else None


def _whole(
    key: str, tensor: Tensor, tp_axis: int | None, place: _Place, shards: ExpertShards
) -> ShardedTensor:
    """One contiguous range of the global tensor."""
    fragments = list(place.own)
    if tp_axis is not None:
        fragments.append(shards.fragment(tp_axis, shards.tp_rank, shards.tp_size))
    return ShardedTensor.from_rank_offsets(
        key,
        tensor,
        *place.leading,
        *fragments,
        replica_id=(0, 0 if tp_axis is not None else shards.tp_rank, shards.dp_rank),
        prepend_axis_num=len(place.leading),
    )


def _halved(
    key: str, tensor: Tensor, tp_axis: int | None, place: _Place, shards: ExpertShards
) -> ShardedTensorFactory:
    """Two ranges: in the global tensor all gates stand first, so a rank's two halves are not neighbours."""
    if tp_axis != _OUT_AXIS:
        raise ValueError(f"{key}: only outputs are halves of gate and linear part, not axis {tp_axis}")

    def build(key: str, whole: Tensor, replica_id: Any, flattened_range: None) -> list[ShardedTensor]:
        del flattened_range
        return [
            ShardedTensor.from_rank_offsets(
                key,
                half,
                *place.leading,
                *place.own,
                shards.fragment(_OUT_AXIS, index * shards.tp_size + shards.tp_rank, 2 * shards.tp_size),
                replica_id=replica_id,
                prepend_axis_num=len(place.leading),
            )
            for index, half in enumerate(whole.chunk(2, dim=place.out_axis))
        ]

    def merge(halves: list[Tensor]) -> Tensor:
        return torch.cat(halves, dim=place.out_axis)

    return ShardedTensorFactory(key, tensor, build, merge, (0, 0, shards.dp_rank))
