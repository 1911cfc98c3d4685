"""What a legality rule is: a reason, where it is stated, and a function that finds what breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from moe_bench.spec.problem import Problem
from moe_bench.spec.recipe import Recipe

Found = tuple[str, str, str]
"""Dotted key at which the user would change the recipe, the values that clash, the nearest legal change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """One reason for which a recipe cannot run, or would not run as it says."""

    name: str
    reason: str
    sources: tuple[str, ...]
    """`megatron/...py:line` of Megatron-Core 0.19.2 where it refuses, or the place that states the limit."""
    find: Callable[[Recipe], Iterator[Found]]

    def problems(self, recipe: Recipe) -> Iterator[Problem]:
        """Every place at which `recipe` breaks this rule."""
        for key, values, fix in self.find(recipe):
            because = f"{values}: {self.reason} ({self.sources[0]})"
            yield Problem(tuple(key.split(".")), because, fix, self.name)


def rule(reason: str, *sources: str) -> Callable[[Callable[[Recipe], Iterator[Found]]], Rule]:
    """Make a rule of the function that finds what breaks it; the function's name becomes the rule's."""

    def made(find: Callable[[Recipe], Iterator[Found]]) -> Rule:
        return Rule(name=find.__name__, reason=reason, sources=sources, find=find)

    return made


def nearest_divisor(number: int, wanted: int) -> int:
    """The largest divisor of `number` that is at most `wanted`."""
    return max(divisor for divisor in range(1, min(number, wanted) + 1) if number % divisor == 0)


def nearest_multiples(number: int, unit: int) -> str:
    """The multiples of `unit` around `number`, as text: `6 or 8`."""
    below = number // unit * unit
    return f"{below} or {below + unit}" if below else str(unit)
