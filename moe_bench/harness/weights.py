"""Initial weights that depend on a parameter's name alone, so that every layout starts from the same model.

Megatron-Core draws weights rank by rank, and the number of draws depends on which layers and experts a rank
holds. Here each parameter is found through the model's sharded state dict, which knows its global name, shape
and offset; the whole tensor is drawn from the name, and the rank keeps its part.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from moe_bench.harness.adapters import SECOND

_EXPERTS = ".experts.experts."


@torch.no_grad()  # type: ignore[untyped-decorator]
def initialise_by_name(
    chunks: Sequence[torch.nn.Module], *, std: float, seed: int, experts_apart: bool = False
) -> None:
    """Draw every parameter of `chunks` from N(0, std); the weights of norms from N(1, std).

    Adapters begin without effect: their second matrix is zero. Buffers keep their values. `experts_apart`
    draws a rank's own experts alone, where all of a layer are too many; they are others than those drawn
    together, as numbers drawn on a GPU are others than a host's. Raises `RuntimeError` if some part of a
    parameter was not reached, as that part would differ between layouts.
    """
    for chunk in chunks:
        reached: dict[int, dict[int, int]] = {}
        for shard in sharded_tensors(chunk):
            data = shard.data
            if data is None or not data.is_floating_point():
                continue
            data.copy_(_values(shard, std=std, seed=seed, experts_apart=experts_apart))
            reached.setdefault(data.untyped_storage().data_ptr(), {})[data.data_ptr()] = data.numel()
        _require_all_reached(chunk, reached)


@torch.no_grad()  # type: ignore[untyped-decorator]
def nudge_by_name(
    chunks: Sequence[torch.nn.Module], *, fraction: float, seed: int, experts_apart: bool = False
) -> None:
    """Move every parameter of `chunks` up or down by `fraction` of itself; which, depends on its name."""
    for chunk in chunks:
        for shard in sharded_tensors(chunk):
            if shard.data is not None and shard.data.is_floating_point():
                signs = _drawn(shard, name=f"nudge:{seed}", experts_apart=experts_apart).sign()
                shard.data.mul_(1.0 + fraction * signs)


def _values(shard: ShardedTensor, *, std: float, seed: int, experts_apart: bool) -> torch.Tensor:
    """The part of the tensor named `shard.key` that this rank holds."""
    if shard.key.endswith(SECOND):
        return torch.zeros(shard.local_shape)
    values = _drawn(shard, name=str(seed), experts_apart=experts_apart) * std
    if _is_norm_weight(shard.key):
        values += 1.0
    return values


def _drawn(shard: ShardedTensor, *, name: str, experts_apart: bool) -> torch.Tensor:
    """The rank's part of a tensor that is drawn from N(0, 1) by `name` and its own key, on its device."""
    num_stacked = _num_index_axes(shard)
    stack_index = tuple(shard.global_offset[:num_stacked])
    if not (experts_apart and _EXPERTS in shard.key):
        return local_part(shard, _whole(shard, name, stack_index), num_skipped_axes=num_stacked)
    mine, *rest = _place(shard, num_skipped_axes=num_stacked)
    experts = [_whole(shard, name, (*stack_index, expert)) for expert in range(mine.start, mine.stop)]
    return torch.stack([expert[tuple(rest)] for expert in experts]).reshape(shard.local_shape)


def _whole(shard: ShardedTensor, name: str, index: tuple[int, ...]) -> torch.Tensor:
    """The tensor at `index` of the leading axes of a global one, all ranks' parts of it."""
    device = torch.device("cpu") if shard.data is None else shard.data.device
    whole_name = f"{name}:{shard.key}:{index}"
    generator = torch.Generator(device).manual_seed(zlib.crc32(whole_name.encode()))
    return torch.randn(shard.global_shape[len(index) :], generator=generator, device=device)


def local_part(shard: ShardedTensor, whole: torch.Tensor, *, num_skipped_axes: int = 0) -> torch.Tensor:
    """The part of the global tensor `whole`, less its first axes, that this rank holds."""
    return whole[_place(shard, num_skipped_axes=num_skipped_axes)].reshape(shard.local_shape)


def _place(shard: ShardedTensor, *, num_skipped_axes: int) -> tuple[slice, ...]:
    """Where the rank's part lies along the axes of the global tensor, less its first ones."""
    lengths = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return tuple(
        slice(start, start + length)
        for start, length in zip(
            shard.global_offset[num_skipped_axes:], lengths[num_skipped_axes:], strict=True
        )
    )


def _num_index_axes(shard: ShardedTensor) -> int:
    """Axes of the global tensor that count tensors, such as layers.

    Experts are drawn together whether a module holds one of them or a stack: their global tensor is
    [leading axes, experts, out, in], or [leading axes, experts, out] for biases.
    """
    if _EXPERTS not in shard.key:
        return int(shard.prepend_axis_num)
    return len(shard.global_shape) - (2 if shard.key.endswith("bias") else 3)


def _is_norm_weight(key: str) -> bool:
    return key.endswith(("norm.weight", "layernorm.weight", "layer_norm_weight"))


def sharded_tensors(chunk: torch.nn.Module) -> Iterator[ShardedTensor]:
    """Every sharded tensor of a chunk; a factory stands for several (gate and linear half of SwiGLU)."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    for entry in chunk.sharded_state_dict(metadata={"dp_cp_group": group}).values():
        yield from _leaves(entry.build() if isinstance(entry, ShardedTensorFactory) else entry)


def _leaves(tree: Any) -> Iterator[ShardedTensor]:
    if isinstance(tree, ShardedTensor):
        yield tree
    elif isinstance(tree, dict):
        for branch in tree.values():
            yield from _leaves(branch)
    elif isinstance(tree, list | tuple):
        for branch in tree:
            yield from _leaves(branch)


def _require_all_reached(chunk: torch.nn.Module, reached: dict[int, dict[int, int]]) -> None:
    for name, parameter in chunk.named_parameters():
        num_reached = sum(reached.get(parameter.untyped_storage().data_ptr(), {}).values())
        if num_reached < parameter.numel():
            raise RuntimeError(
                f"{name}: {num_reached} of {parameter.numel()} values stand in the sharded state dict; "
                "the rest would differ between layouts"
            )
