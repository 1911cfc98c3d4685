"""Rules that make a recipe impossible or other than it says: values, reason, source, nearest legal change."""

from __future__ import annotations

from moe_bench.spec.legality import (
    attention,
    batches,
    dispatch,
    experts,
    graphs,
    grid,
    layers,
    overlap,
    precision,
    quack,
    quantization,
    residual,
    routers,
    saving,
    sharding,
    structure,
)
from moe_bench.spec.legality.rule import Rule
from moe_bench.spec.problem import Problem
from moe_bench.spec.recipe import Recipe

GROUPS = (
    structure, grid, attention, layers, experts, residual, routers, dispatch, batches, precision, overlap,
    saving, graphs, sharding, quack, quantization,
)  # fmt: skip
"""The modules of rules, in the order in which they are asked; the docstring of each says what it is about."""

RULES: tuple[Rule, ...] = tuple(rule for group in GROUPS for rule in group.RULES)


def legality_problems(recipe: Recipe) -> tuple[Problem, ...]:
    """Every rule that `recipe` breaks, at every place; empty for a legal recipe."""
    return tuple(problem for rule in RULES for problem in rule.problems(recipe))


__all__ = ["GROUPS", "RULES", "Problem", "Rule", "legality_problems"]
