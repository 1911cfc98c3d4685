"""What a rule's rearrangement does to tensors, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from moe_bench.checkpoints.rule import (
    AlternatingGate,
    GroupedQkv,
    NamedShape,
    Rule,
    Same,
    Stacked,
    TransposedExperts,
)
from moe_bench.errors import BadInputError


def to_megatron(rule: Rule, parts: Sequence[Tensor]) -> Tensor:
    """The tensor `rule.shape` made of `parts`, which are in the order of `rule.huggingface`.

    Raises BadInputError where a part has another shape than the rule says, or the parts several types.
    """
    for named, part in zip(rule.huggingface, parts, strict=True):
        require_shape(named, tuple(part.shape))
    if len({part.dtype for part in parts}) > 1:
        types = ", ".join(
            f"{named.name} {part.dtype}" for named, part in zip(rule.huggingface, parts, strict=True)
        )
        raise BadInputError(f"{rule.label}: made of tensors of several types ({types}); save them as one")
    match rule.how:
        case Same():
            return parts[0]
        case Stacked():
            return torch.cat(list(parts))
        case GroupedQkv() as qkv:
            heads = [qkv.heads_per_group, 1, 1]
            by_group = [
                part.unflatten(0, (qkv.num_query_groups, num_heads * qkv.head_dim))
                for num_heads, part in zip(heads, parts, strict=True)
            ]
            return torch.cat(by_group, dim=1).flatten(0, 1)
        case TransposedExperts():
            return parts[0].transpose(1, 2).contiguous()
        case AlternatingGate(is_bias=is_bias):
            pairs = parts[0].unflatten(-1, (-1, 2))
            return (pairs.transpose(1, 2) if is_bias else pairs.permute(0, 3, 2, 1)).flatten(1, 2)


def to_huggingface(rule: Rule, whole: Tensor) -> tuple[Tensor, ...]:
    """The tensors `rule.huggingface` that `whole` is made of: the inverse of `to_megatron`."""
    lengths = [named.shape[0] for named in rule.huggingface]
    match rule.how:
        case Same():
            return (whole,)
        case Stacked():
            return tuple(part.contiguous() for part in whole.split(lengths))
        case GroupedQkv() as qkv:
            by_group = whole.unflatten(0, (qkv.num_query_groups, -1))
            widths = [heads * qkv.head_dim for heads in (qkv.heads_per_group, 1, 1)]
            return tuple(part.flatten(0, 1) for part in by_group.split(widths, dim=1))
        case TransposedExperts():
            return (whole.transpose(1, 2).contiguous(),)
        case AlternatingGate(is_bias=is_bias):
            halves = whole.unflatten(1, (2, -1))
            return ((halves.transpose(1, 2) if is_bias else halves.permute(0, 3, 2, 1)).flatten(-2),)


def require_shape(named: NamedShape, found: tuple[int, ...]) -> None:
    """Raise BadInputError where a tensor has another shape than the model says."""
    if found != named.shape:
        raise BadInputError(
            f"{named.name}: shape {list(found)}, but the model says {list(named.shape)}; "
            "convert with the model that the checkpoint is of"
        )


def global_tensors(
    rules: Iterable[Rule], read: Callable[[str], Tensor]
) -> Mapping[str, Callable[[], Tensor]]:
    """For each key of a Megatron-Core checkpoint, how to make its whole tensor of those that `read` gives."""
    by_key: dict[str, list[Rule]] = {}
    for rule in rules:
        by_key.setdefault(rule.megatron, []).append(rule)

    def maker(parts: list[Rule]) -> Callable[[], Tensor]:
        def make() -> Tensor:
            made = [to_megatron(rule, [read(named.name) for named in rule.huggingface]) for rule in parts]
            return made[0] if parts[0].expert is None else torch.stack(made)

        return make

    return {key: maker(parts) for key, parts in by_key.items()}
