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
    saving,
    sharding,
)
from moe_bench.spec.legality.rule import Problem, Rule
from moe_bench.spec.recipe import Recipe

RULES: tuple[Rule, ...] = (
    *grid.RULES,
    *attention.RULES,
    *layers.RULES,
    *experts.RULES,
    *dispatch.RULES,
    *batches.RULES,
    *precision.RULES,
    *overlap.RULES,
    *saving.RULES,
    *graphs.RULES,
    *sharding.RULES,
)


def legality_problems(recipe: Recipe) -> tuple[Problem, ...]:
    """Every rule that `recipe` breaks, at every place; empty for a legal recipe."""
    return tuple(problem for rule in RULES for problem in rule.problems(recipe))


__all__ = ["RULES", "Problem", "Rule", "legality_problems"]
