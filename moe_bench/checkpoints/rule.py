"""One tensor of a Megatron-Core checkpoint and what it is made of in a Hugging Face one, as pure data.

Nothing here touches a tensor: a rule says names, shapes and which rearrangement leads from one side to the
other; `harness/convert/rearrange.py` does it, in both directions.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class NamedShape:
    """A tensor by name."""

    name: str
    shape: Shape


@dataclass(frozen=True, slots=True)
class Same:
    """One tensor, the same on both sides."""


@dataclass(frozen=True, slots=True)
class Stacked:
    """Several tensors behind one another along the first axis, such as gate and linear half of SwiGLU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupedQkv:
    """Queries, keys and values, which Megatron-Core keeps group by group: its queries, its key, its value.

    Rows of `linear_qkv` are [groups, heads per group + 2, head_dim] (megatron/core/transformer/attention.py,
    get_query_key_value_tensors).
    """

    num_query_groups: int
    heads_per_group: int
    head_dim: int


@dataclass(frozen=True, slots=True)
class TransposedExperts:
    """[experts, in, out] there, [experts, out, in] here (GPT-OSS multiplies from the right)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AlternatingGate:
    """Gate and linear part take turns there, along the last axis; here all gates stand first (GPT-OSS).

    [experts, hidden, 2 ffn] becomes [experts, 2 ffn, hidden]; a bias [experts, 2 ffn] keeps its axes.
    """

    is_bias: bool


Rearrangement = Same | Stacked | GroupedQkv | TransposedExperts | AlternatingGate


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One tensor of a Megatron-Core checkpoint, or one expert of a stacked tensor, and its counterpart."""

    megatron: str
    """Key of the global tensor in a distributed checkpoint."""
    shape: Shape
    """Of what this rule gives; without the axis of experts where it gives one of them."""
    huggingface: tuple[NamedShape, ...]
    """What it is made of, in the order in which `how` takes it."""
    how: Rearrangement = Same()
    expert: int | None = None
    """Index along the first axis of the global tensor; None where the rule gives the whole tensor."""
    num_experts: int | None = None
    """Length of that axis."""
    copies: tuple[str, ...] = ()
    """Names under which a Hugging Face checkpoint holds the same tensor once more (MTP's embedding)."""

    def __post_init__(self) -> None:
        """Raise ValueError where the two sides differ in size, which no rearrangement allows."""
        if prod(self.shape) != sum(prod(part.shape) for part in self.huggingface):
            raise ValueError(f"{self.label}: {self.shape} cannot be made of {self.huggingface}")

    @property
    def global_shape(self) -> Shape:
        """Of the whole tensor in the distributed checkpoint."""
        return self.shape if self.num_experts is None else (self.num_experts, *self.shape)

    @property
    def label(self) -> str:
        """The key, with the expert where there is one: `decoder.layers.3...linear_fc1.weight[17]`."""
        return self.megatron if self.expert is None else f"{self.megatron}[{self.expert}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a part of a model stands on either side: prefixes that end in a dot, or are empty."""

    megatron: str
    huggingface: str

    def rule(self, megatron: str, huggingface: str | tuple[str, ...], *shapes: Shape, **more: Any) -> Rule:
        """The rule for names below this place; one shape where nothing is rearranged, else one per source.

        The shape on Megatron-Core's side is that of `Stacked` and `GroupedQkv`: the sources behind one
        another. `more` are further fields of the rule.
        """
        names = (huggingface,) if isinstance(huggingface, str) else huggingface
        stacked = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return Rule(
            megatron=self.megatron + megatron,
            shape=more.pop("shape", stacked),
            huggingface=tuple(
                NamedShape(name=self.huggingface + name, shape=shape)
                for name, shape in zip(names, shapes, strict=True)
            ),
            **more,
        )
