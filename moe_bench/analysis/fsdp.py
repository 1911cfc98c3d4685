"""How Megatron-FSDP lays parameters out: buffers divided over the ranks, and what padding adds to them.

Megatron-Core 0.19.2, distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py.
"""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from moe_bench.analysis.tensors import Tensor, chunk_parts
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A parameter and where it starts in its buffer, in elements."""

    tensor: Tensor
    start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardedBuffer:
    """Parameters that are gathered into one tensor, and whose gradients are reduced as one.

    Such a tensor is a layer's experts, the rest of a layer, or everything outside of layers, each apart from
    what is stored in another type.
    """

    items: tuple[Item, ...]
    num_elements: int
    """Padding included: every rank holds as many, in whole rows."""
    num_shards: int
    in_layer: bool
    """Whether it is gathered for each pass through its layer and freed in between (`optim_grads_params`)."""
    is_expert: bool
    """Whether it is divided over the expert-data-parallel ranks, not over the data-parallel ones."""
    is_quantized: bool
    """Whether its weights are stored in FP8 (`low_precision.param_gather`)."""

    @property
    def shard_elements(self) -> int:
        """What one rank holds."""
        return self.num_elements // self.num_shards

    def in_shard(self, shard: int) -> Iterator[tuple[Tensor, int]]:
        """The tensors of shard number `shard`, and how many elements of each it holds."""
        first = shard * self.shard_elements
        for item in self.items:
            end = min(item.start + item.tensor.num_elements, first + self.shard_elements)
            if (length := end - max(item.start, first)) > 0:
                yield item.tensor, length


def sharded_buffers(recipe: Recipe, chunk: Chunk) -> tuple[ShardedBuffer, ...]:
    """The buffers of a chunk: of each layer (`optim_grads_params`) or of all (`_get_parameter_groups`).

    Layers of one structure have equal buffers, which are laid out once.
    """
    if recipe.parallel.fsdp_strategy != "optim_grads_params":
        whole = [tensor for part in chunk_parts(recipe, chunk) for tensor in part.tensors]
        return tuple(_buffers(recipe, whole, in_layer=False))
    # the last layer brings the final norm along
    last = chunk_parts(recipe, replace(chunk, layers=chunk.layers[-1:]))
    rest = [tensor for part in last if not part.is_layer for tensor in part.tensors]
    structures = [recipe.model.layer(layer) for layer in chunk.layers[:-1]]
    first = dict(zip(reversed(structures), reversed(chunk.layers[:-1]), strict=True))
    of_structure = {
        structure: tuple(_buffers(recipe, _layer_tensors(recipe, layer), in_layer=True))
        for structure, layer in first.items()
    }
    layers = [of_structure[structure] for structure in structures]
    layers += [tuple(_buffers(recipe, part.tensors, in_layer=True)) for part in last if part.is_layer]
    return (*_buffers(recipe, rest, in_layer=False), *itertools.chain.from_iterable(layers))


def _layer_tensors(recipe: Recipe, layer: int) -> tuple[Tensor, ...]:
    alone = Chunk(
        pipeline_rank=0,
        virtual_stage=0,
        layers=(layer,),
        has_embedding=False,
        has_loss=False,
        num_mtp_layers=0,
    )
    return next(part.tensors for part in chunk_parts(recipe, alone) if part.is_layer)


def _buffers(recipe: Recipe, tensors: Sequence[Tensor], *, in_layer: bool) -> Iterator[ShardedBuffer]:
    """Of what stands together: experts apart from the rest, and FP8 weights apart from BF16 ones."""
    keeps_fp8 = recipe.low_precision is not None and recipe.low_precision.param_gather
    for is_expert, is_quantized in itertools.product((False, True), (False, True)):
        kind = is_expert, is_quantized
        own = [tensor for tensor in tensors if (tensor.is_expert, tensor.is_quantized and keeps_fp8) == kind]
        if own:
            yield _buffer(recipe, own, in_layer=in_layer, is_quantized=is_quantized)


def _buffer(
    recipe: Recipe, tensors: Sequence[Tensor], *, in_layer: bool, is_quantized: bool
) -> ShardedBuffer:
    """The widest rows come first; a shard is a multiple of them (`build_data_parallel_buffer_index`)."""
    parallel, is_expert = recipe.parallel, tensors[0].is_expert
    num_ranks = parallel.expert_data if is_expert else parallel.dense_shards
    num_shards = max(1, num_ranks // parallel.num_optimizer_instances)
    ordered = sorted(tensors, key=lambda tensor: tensor.num_columns, reverse=True)
    grain = row_grain(ordered)
    items, end = _placed(ordered, grain)
    divisor = num_shards * grain
    return ShardedBuffer(
        items=tuple(items),
        num_elements=-(-end // divisor) * divisor,
        num_shards=num_shards,
        in_layer=in_layer,
        is_expert=is_expert,
        is_quantized=is_quantized,
    )


def row_grain(ordered: Iterable[Tensor]) -> int:
    """Elements that are never divided, of tensors sorted by their columns, widest first.

    The columns of the first; where those of another do not fit in, the least common multiple, unless the
    whole tensor is smaller (`chunk_size_factor`).
    """
    grain = 0
    for tensor in ordered:
        columns, size = tensor.num_columns, tensor.num_elements
        grain = grain or columns
        fits = grain % columns == 0 and size % grain == 0
        if columns != grain and not fits and size >= grain:
            grain = math.lcm(grain, columns)
    return grain


def _placed(ordered: Sequence[Tensor], grain: int) -> tuple[list[Item], int]:
    """Where each tensor starts, and where the last ends.

    A tensor that fills no whole number of grains shares its last one with the end of another, and with
    tensors smaller than a grain as far as they fit.
    """
    items: list[Item] = []
    large = deque(tensor for tensor in ordered if tensor.num_elements >= grain)
    small = [tensor for tensor in ordered if tensor.num_elements < grain]
    end = 0
    while large:
        tensor = large.popleft()
        items.append(Item(tensor=tensor, start=end))
        gap = end + tensor.num_elements
        num_whole, remainder = divmod(tensor.num_elements, grain)
        end += num_whole * grain
        if not remainder:
            continue
        end += grain
        space = grain - remainder
        for index, other in enumerate(large):
            other_remainder = other.num_elements % grain
            if other_remainder and remainder + other_remainder <= grain:
                items.append(Item(tensor=other, start=end - other_remainder))
                del large[index]
                space -= other_remainder
                end += other.num_elements - other_remainder
                break
        for other in tuple(small):
            if other.num_elements <= space:
                items.append(Item(tensor=other, start=gap))
                small.remove(other)
                gap += other.num_elements
                space -= other.num_elements
    for tensor in small:
        items.append(Item(tensor=tensor, start=end))
        end += tensor.num_elements
    return items, end
