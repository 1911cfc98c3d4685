"""The rules of legality on a whole space of layouts: each rule is asked once per way in which it looks.

A rule is a function of the fields that it reads. While it judges a recipe, its reads are recorded; which
field it reads next depends only on the values that it has read before, so its answers form a decision tree
over the axes of the space. Walking that tree gives the rule's own answer, and a branch that nobody has walked
is learned by asking the rule. Nothing about any rule is written down here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from moe_bench.projection.search.layout import AXES_OF_FIELD, Axis
from moe_bench.projection.search.space import Space
from moe_bench.spec.base import Spec
from moe_bench.spec.legality import RULES, Rule
from moe_bench.spec.recipe import Recipe

_HOLDERS = frozenset(
    ".".join(key.split(".")[:depth]) for key in AXES_OF_FIELD for depth in range(1, key.count(".") + 1)
)
"""Parts of a recipe of which some fields are decided by an axis and others are not."""


@dataclass(slots=True)
class _Branch:
    """A rule that has yet to learn the value of one axis."""

    axis: Axis
    children: list[_Branch | bool | None]
    """By index of the axis's value: another branch, whether the layout is legal, or None where unknown."""


_Pending = tuple[Rule, _Branch]


@dataclass(slots=True)
class Legality:
    """Answers of all rules about the layouts of one space."""

    space: Space
    refused: Counter[str] = field(default_factory=Counter)
    """Layouts by the name of the first rule that refuses them."""
    examples: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """By the name of a rule, the first indices of layouts that it refuses, whatever the other indices are."""
    _roots: dict[str, _Branch | bool] = field(default_factory=dict)
    _axes: dict[str, set[Axis]] = field(default_factory=dict)
    """What each rule has read so far."""
    _splits: dict[tuple[object, ...], tuple[tuple[int, ...], Counter[str]]] = field(default_factory=dict)

    def legal_families(self) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Every choice on all axes but the last that leaves a legal layout, with the legal indices there.

        Counts the others in `refused`; may be run through once.
        """
        pending = []
        for rule in RULES:
            root = self._advance(rule, self._root(rule), (), 0)
            if root is False:
                self._refuse(rule.name, (), self.space.num_layouts)
                return
            if isinstance(root, _Branch):
                pending.append((rule, root))
        yield from self._below((), pending, self.space.num_layouts)

    def is_legal(self, indices: Sequence[int]) -> bool:
        """Whether no rule refuses the layout with these indices."""
        return all(self._advance(rule, self._root(rule), indices, len(indices)) is True for rule in RULES)

    def _below(
        self, chosen: tuple[int, ...], pending: Sequence[_Pending], num_layouts: int
    ) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        axis = len(chosen)
        if axis == Axis.SPLIT:
            legal = self._legal_splits(chosen, pending)
            if legal:
                yield chosen, legal
            return
        num_each = num_layouts // self.space.sizes[axis]
        for value in range(self.space.sizes[axis]):
            extended = (*chosen, value)
            left = self._judged(extended, pending)
            if isinstance(left, str):
                self._refuse(left, extended, num_each)
            else:
                yield from self._below(extended, left, num_each)

    def _legal_splits(self, chosen: tuple[int, ...], pending: Sequence[_Pending]) -> tuple[int, ...]:
        """What the last axis leaves: the same wherever undecided rules stand at the same places of their
        trees, and the axes that they read have the same values.
        """
        key = self._key(chosen, pending)
        if key not in self._splits:
            legal, refused = [], Counter[str]()
            for value in range(self.space.sizes[Axis.SPLIT]):
                left = self._judged((*chosen, value), pending)
                if isinstance(left, str):
                    refused[left] += 1
                    self.examples.setdefault(left, (*chosen, value))
                else:
                    legal.append(value)
            # asked again, since the rules may have read more axes than they had before
            key = self._key(chosen, pending)
            self._splits[key] = tuple(legal), refused
        legal_splits, refusals = self._splits[key]
        self.refused.update(refusals)
        return legal_splits

    def _refuse(self, name: str, chosen: tuple[int, ...], num_layouts: int) -> None:
        self.refused[name] += num_layouts
        self.examples.setdefault(name, chosen)

    def _key(self, chosen: tuple[int, ...], pending: Sequence[_Pending]) -> tuple[object, ...]:
        axes = set().union(*(self._axes[rule.name] for rule, _ in pending)) - {Axis.SPLIT}
        return (*(id(branch) for _, branch in pending), *(chosen[axis] for axis in sorted(axes)))

    def _judged(self, chosen: tuple[int, ...], pending: Sequence[_Pending]) -> list[_Pending] | str:
        """The rules that are still undecided, or the name of the first that refuses."""
        left = []
        for rule, branch in pending:
            found = self._advance(rule, branch, chosen, len(chosen))
            if found is False:
                return rule.name
            if isinstance(found, _Branch):
                left.append((rule, found))
        return left

    def _advance(
        self, rule: Rule, node: _Branch | bool, chosen: Sequence[int], num_chosen: int
    ) -> _Branch | bool:
        """Where the rule stands once the first `num_chosen` axes have their values."""
        while isinstance(node, _Branch) and node.axis < num_chosen:
            child = node.children[chosen[node.axis]]
            if child is None:
                self._learn(rule, chosen)
                child = node.children[chosen[node.axis]]
            node = cast("_Branch | bool", child)
        return node

    def _root(self, rule: Rule) -> _Branch | bool:
        if rule.name not in self._roots:
            self._learn(rule, ())
        return self._roots[rule.name]

    def _learn(self, rule: Rule, chosen: Sequence[int]) -> None:
        """Ask the rule about a layout that begins with `chosen`, and keep its answer in its tree."""
        indices = (*chosen, *(0 for _ in self.space.sizes[len(chosen) :]))
        reads: dict[Axis, None] = {}
        watched = cast(Recipe, _Watched(self.space.recipe(indices), "", reads))
        is_legal = next(rule.find(watched), None) is None
        axes = tuple(reads)
        self._axes.setdefault(rule.name, set()).update(axes)
        if not axes:
            self._roots[rule.name] = is_legal
            return
        node = self._roots.setdefault(rule.name, self._branch(axes[0]))
        for axis, following in zip(axes, (*axes[1:], None), strict=True):
            branch = cast(_Branch, node)
            child = branch.children[indices[axis]]
            if child is None:
                child = is_legal if following is None else self._branch(following)
                branch.children[indices[axis]] = child
            node = child

    def _branch(self, axis: Axis) -> _Branch:
        return _Branch(axis, [None] * self.space.sizes[axis])


class _Watched:
    """A recipe, or a part of it, that records which axes decide what is read of it, in order."""

    __slots__ = ("_path", "_reads", "_spec")

    def __init__(self, spec: Spec, path: str, reads: dict[Axis, None]) -> None:
        self._spec, self._path, self._reads = spec, path, reads

    def __getattr__(self, name: str) -> Any:
        computed = getattr(type(self._spec), name, None)
        if isinstance(computed, property) and computed.fget is not None:
            return computed.fget(self)
        path = f"{self._path}{name}"
        for axis in AXES_OF_FIELD.get(path, ()):
            self._reads[axis] = None
        value = getattr(self._spec, name)
        if path in _HOLDERS and value is not None:
            return _Watched(value, f"{path}.", self._reads)
        return value
