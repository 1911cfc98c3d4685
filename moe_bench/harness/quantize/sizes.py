"""What the weights of a quantised model weigh, part by part, over all ranks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from megatron.core import parallel_state
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.utils import unwrap_model
from modelopt.torch.quantization.nn import QuantModule
from torch import Tensor

from moe_bench.harness.kernels.experts import ExpertStack
from moe_bench.harness.quantize.formats import EXPERTS, KEPT, STORAGE, block_misfit
from moe_bench.harness.quantize.model import is_quantized, linear_weight
from moe_bench.harness.quantize.packed import held_weight
from moe_bench.results.quantization import PartSize
from moe_bench.spec.recipe import QuantFormat

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True, slots=True, kw_only=True)
class PartOfRank:
    """The weights of alike modules that this rank answers for."""

    name: str
    left_out_because: str | None
    num_modules: int
    """Whole ones; a tensor-parallel rank but the first has parts of modules that are counted there."""
    num_params: int
    num_bytes: int
    original_bytes: int


def rank_parts(
    chunks: Sequence[torch.nn.Module], format: QuantFormat, *, experts_only: bool
) -> tuple[PartOfRank, ...]:
    """Of this rank, each weight on one of the ranks that hold it alone."""
    return tuple(
        part
        for chunk in unwrap_model(list(chunks))
        for name, module in chunk.named_modules()
        for part in _parts(name, module, format, experts_only=experts_only)
    )


def merged(parts: Iterable[PartOfRank]) -> tuple[PartSize, ...]:
    """Those of all ranks, alike ones together."""
    alike: dict[tuple[str, str | None], PartOfRank] = {}
    for part in parts:
        key = (part.name, part.left_out_because)
        before = alike.get(key)
        alike[key] = part if before is None else _sum(before, part)
    return tuple(
        PartSize(
            name=part.name,
            num_modules=part.num_modules,
            num_params=part.num_params,
            num_bytes=part.num_bytes,
            original_bytes=part.original_bytes,
            left_out_because=part.left_out_because,
        )
        for part in alike.values()
    )


def _sum(one: PartOfRank, other: PartOfRank) -> PartOfRank:
    return replace(
        one,
        num_modules=one.num_modules + other.num_modules,
        num_params=one.num_params + other.num_params,
        num_bytes=one.num_bytes + other.num_bytes,
        original_bytes=one.original_bytes + other.original_bytes,
    )


def _parts(
    name: str, module: torch.nn.Module, format: QuantFormat, *, experts_only: bool
) -> Iterator[PartOfRank]:
    """Of one module: its weight, and what lies beside it (biases) in the same line."""
    own = [one for one in module.named_parameters(recurse=False) if _is_counted_here(one[1])]
    if not own:
        return
    reason = _left_out_because(name, module, format, experts_only=experts_only)
    weights = [parameter for kind, parameter in own if kind.startswith("weight")]
    num_matrices = module.num_experts if isinstance(module, ExpertStack) else max(1, len(weights))
    num_modules = num_matrices if _tensor_rank(own[0][1]) == 0 else 0
    num_bytes = original_bytes = sum(parameter.nbytes for _, parameter in own)
    if reason is None:
        num_weights = sum(weight.numel() for weight in weights)
        num_bytes -= sum(weight.nbytes for weight in weights)
        held = held_weight(module)
        if held is None:
            num_bytes += STORAGE[format].num_bytes(num_weights, num_tensors=num_modules)
        else:
            num_bytes += held.num_bytes - (0 if num_modules else held.tensor_scale_bytes)
    yield PartOfRank(
        name=_NUMBER.sub("*", name),
        left_out_because=reason,
        num_modules=num_modules,
        num_params=sum(parameter.numel() for _, parameter in own),
        num_bytes=num_bytes,
        original_bytes=original_bytes,
    )


def _is_counted_here(parameter: Tensor) -> bool:
    """Whether this rank is the first of those that hold these values; a tied copy is counted at its first."""
    is_divided = getattr(parameter, "tensor_model_parallel", False)
    return (
        (is_divided or _tensor_rank(parameter) == 0)
        and _data_rank(parameter) == 0
        and bool(param_is_not_shared(parameter))
    )


def _is_of_expert_groups(parameter: Tensor) -> bool:
    """As Megatron-Core tells them apart (distributed_data_parallel.py)."""
    return not getattr(parameter, "allreduce", True)


def _tensor_rank(parameter: Tensor) -> int:
    if _is_of_expert_groups(parameter):
        return int(parallel_state.get_expert_tensor_parallel_rank())
    return int(parallel_state.get_tensor_model_parallel_rank())


def _data_rank(parameter: Tensor) -> int:
    if _is_of_expert_groups(parameter):
        return int(parallel_state.get_expert_data_parallel_rank())
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))


def _left_out_because(
    name: str, module: torch.nn.Module, format: QuantFormat, *, experts_only: bool
) -> str | None:
    """None for a module whose weight is quantised, as its quantiser says."""
    if is_quantized(module):
        return None
    for beginning, why in KEPT.items():
        if name.startswith(beginning):
            return why
    weight = linear_weight(module)
    if not isinstance(module, QuantModule) or weight is None:
        return "not a linear layer that modelopt knows"
    if experts_only and EXPERTS not in f"{name}.":
        return "not a routed expert"
    return block_misfit(weight, format) or "modelopt's default leaves it out"
