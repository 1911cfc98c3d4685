"""What Megatron-FSDP holds of a model and its optimizer, as parts of the tensors of an ordinary checkpoint.

Megatron-FSDP has a format of its own, of DTensors. But a rank of it holds rows of weights, and rows beginning
anywhere are a part that Megatron-Core's distributed checkpoints know (ShardedTensor without
axis_fragmentations). So what is saved here is read under any layout and sharding, and the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from moe_bench.harness.build import Training, torch_optimizers

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Rows that this rank holds of one weight, as far as they are of one tensor of a checkpoint."""

    weight: Any
    """DTensor that the optimizer updates."""
    mine: slice
    """Where they lie among the rows that this rank holds of it."""
    whole: ShardedTensor
    """That tensor, as the rank would hold it without Megatron-FSDP."""
    first: int
    """Which of its rows the first one is."""

    def of(self, values: Any) -> torch.Tensor:
        """These rows of the weight itself or of one of its moments, in place."""
        local: torch.Tensor = values.to_local()
        return local[self.mine]

    def sharded(self, key: str, values: torch.Tensor) -> ShardedTensor:
        """`values` of these rows as a part of the tensor `key`."""
        num_leading = len(self.whole.global_shape) - values.dim()
        offset = list(self.whole.global_offset)
        offset[num_leading] += self.first
        shape = (1,) * num_leading + tuple(values.shape)
        return replace(
            self.whole,
            key=key,
            data=values.reshape(shape),
            dtype=values.dtype,
            local_shape=shape,
            global_offset=tuple(offset),
            axis_fragmentations=None,
            prepend_axis_num=0,
            # the last number counts data-parallel ranks, each of which has rows of its own
            replica_id=(*tuple(self.whole.replica_id)[:-1], 0),
        )


def is_fsdp(training: Training) -> bool:
    """Whether Megatron-FSDP divides the weights."""
    return bool(training.chunks[0].ddp_config.use_megatron_fsdp)


def fsdp_model_state(training: Training) -> dict[str, Any]:
    """Rows of the weights in the precision of the model, and what else a checkpoint holds of it."""
    dtype = training.config.params_dtype
    rows, others = _divided(training)
    weights = {
        name: one.sharded(one.whole.key, one.of(one.weight).detach().to(dtype)) for name, one in rows.items()
    }
    return {"weights": weights, "others": others}


def fsdp_optimizer_state(training: Training) -> dict[str, Any]:
    """Rows of main weights and moments; zeros where the optimizer has taken no step.

    Keys are those of Megatron-Core's distributed optimizer (sharded_param_state_fully_reshardable).
    """
    rows, _ = _divided(training)
    states = _states(training)
    return {
        kind: {
            name: one.sharded(f"optimizer.state.{kind}.{one.whole.key}", one.of(_values(kind, one, states)))
            for name, one in rows.items()
        }
        for kind in ("param", *_MOMENTS)
    }


@torch.no_grad()  # type: ignore[untyped-decorator]
def take_up_fsdp(training: Training, state: Mapping[str, Any], *, num_steps: int | None) -> None:
    """Put loaded rows into weights and, with `num_steps`, optimizer. A collective call of all ranks.

    None takes the weights of the model and leaves the optimizer fresh.
    """
    rows, _ = _divided(training)
    states = _states(training)
    for name, one in rows.items():
        if num_steps is None:
            _fill(one.of(one.weight), state["model"]["weights"][name])
            continue
        for kind in ("param", *_MOMENTS):
            _fill(one.of(_values(kind, one, states)), state["optimizer"][kind][name])
        if "step" in states[one.weight]:
            states[one.weight]["step"].fill_(num_steps)
    for inner in torch_optimizers(training.optimizer):
        for group in inner.param_groups:
            if num_steps is not None and "step" in group:
                group["step"] = num_steps
    for index, chunk in enumerate(training.chunks):
        # expert biases, and what kernels keep of their scales
        _unwrapped(chunk).load_state_dict(state["model"]["others"].get(f"chunk {index}", {}), strict=False)
        chunk.module.install_optimized_model_weights()
        chunk.start_param_sync()


def _fill(rows: torch.Tensor, loaded: torch.Tensor) -> None:
    rows.copy_(loaded.reshape(rows.shape))


def _values(kind: str, rows: _Rows, states: Mapping[Any, dict[str, Any]]) -> Any:
    return rows.weight if kind == "param" else states[rows.weight][kind]


def _states(training: Training) -> dict[Any, dict[str, Any]]:
    """The optimizer's state of every weight of which this rank holds a row; zeros before the first step."""
    found: dict[Any, dict[str, Any]] = {}
    for inner in torch_optimizers(training.optimizer):
        for group in inner.param_groups:
            for weight in group["params"]:
                if weight.to_local().numel() and not inner.state[weight]:
                    zeros = {kind: torch.zeros_like(weight) for kind in _MOMENTS}
                    inner.state[weight] = zeros if "step" in group else {"step": torch.zeros(()), **zeros}
                found[weight] = inner.state[weight]
    return found


def _divided(training: Training) -> tuple[dict[str, _Rows], dict[str, dict[str, Any]]]:
    """Rows by name, and of each chunk what is no weight; RuntimeError where a weight is in no tensor."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    rows: dict[str, _Rows] = {}
    others: dict[str, dict[str, Any]] = {}
    for index, chunk in enumerate(training.chunks):
        model = _unwrapped(chunk)
        model.state_dict()  # whose hook puts the DTensors in the place of the weights that are computed with
        for name, entry in model.sharded_state_dict(metadata={"dp_cp_group": group}).items():
            if hasattr(entry.data, "megatron_fsdp_slice"):
                for number, one in enumerate(_rows_of(entry)):
                    rows[f"{index}:{name}:{number}"] = one
            else:
                others.setdefault(f"chunk {index}", {})[name] = entry
    held = {id(one.weight) for one in rows.values()}
    weights = [
        p for inner in torch_optimizers(training.optimizer) for g in inner.param_groups for p in g["params"]
    ]
    if any(weight.to_local().numel() and id(weight) not in held for weight in weights):
        raise RuntimeError("the sharded state dict leaves out a weight of Megatron-FSDP")
    return rows, others


def _rows_of(entry: Any) -> Iterator[_Rows]:
    """What this rank holds of a weight: a run of its rows, over the tensors that the weight is saved as."""
    weight = entry.data
    start, stop = _run(weight)
    for first, whole in _tensors_of(entry):
        low, high = max(start, first), min(stop, first + whole.local_shape[0])
        if low < high:
            mine = slice(low - start, high - start)
            yield _Rows(weight=weight, mine=mine, whole=replace(whole, data=None), first=low - first)


def _run(weight: Any) -> tuple[int, int]:
    """Rows of the weight that this rank holds, from the flat range that Megatron-Core's own format reads."""
    row_size = math.prod(weight.orig_param.shape[1:])
    flat: slice = weight.megatron_fsdp_slice
    if flat.start % row_size or flat.stop % row_size:
        raise RuntimeError(f"Megatron-FSDP divides {tuple(weight.orig_param.shape)} within a row")
    return flat.start // row_size, flat.stop // row_size


def _tensors_of(entry: Any) -> Iterator[tuple[int, ShardedTensor]]:
    """Tensors of a checkpoint that a weight is saved as, with the number of its row that each begins at.

    A DTensor has the shape over all tensor ranks, which its module takes for that of one rank's part. A
    factory cuts a weight up, as gate and linear half of SwiGLU; where, is read off numbered rows.
    """
    shape = entry.data.orig_param.shape
    if not isinstance(entry, ShardedTensorFactory):
        yield 0, _of_one_rank(entry, shape)
        return
    numbered = torch.arange(shape[0]).view(-1, *(1 for _ in shape[1:])).expand(shape)
    built = replace(entry, data=numbered).build()
    for part in built.values() if isinstance(built, dict) else built:
        yield int(part.data.flatten()[0]), part


def _of_one_rank(entry: ShardedTensor, shape: torch.Size) -> ShardedTensor:
    """`entry` with a part of `shape` in the place of one that is a whole number of times as large."""
    num_leading = len(entry.global_shape) - len(shape)
    factors = [1] * num_leading + [
        theirs // mine for theirs, mine in zip(entry.local_shape, shape, strict=True)
    ]

    def smaller(sizes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(size // factor for size, factor in zip(sizes, factors, strict=True))

    return replace(
        entry,
        data=None,
        local_shape=tuple(shape),
        global_shape=smaller(entry.global_shape),
        global_offset=smaller(entry.global_offset),
    )


def _unwrapped(chunk: Any) -> Any:
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk
