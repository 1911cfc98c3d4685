"""Every legality rule refuses a recipe that only it refuses, in words that lead to a legal one."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import ModuleType

import pytest

from moe_bench.spec import legality
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.legality import RULES, Rule, legality_problems
from moe_bench.spec.load import Loader
from tests.spec.examples import Example, examples

EXAMPLES = examples()
BY_NAME = {rule.name: rule for rule in RULES}


def test_every_rule_has_an_example() -> None:
    assert {example.rule for example in EXAMPLES} == set(BY_NAME)


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_a_rule_names_key_values_reason_source_and_fix(example: Example) -> None:
    problems = legality_problems(example.broken())
    assert {problem.rule for problem in problems} == {example.rule}
    rule, problem = BY_NAME[example.rule], problems[0]
    why = f": {rule.reason} ({rule.sources[0]})"
    assert problem.problem.endswith(why)
    line = (
        f"{'.'.join(str(part) for part in problem.path)}: {problem.problem.removesuffix(why)}; {problem.fix}"
    )
    assert line == example.says


@pytest.mark.parametrize("example", EXAMPLES, ids=str)
def test_a_refused_recipe_becomes_legal_by_what_is_proposed(example: Example) -> None:
    assert legality_problems(example.cured()) == ()


def test_every_rule_is_asked() -> None:
    modules = [module for _, module in inspect.getmembers(legality, inspect.ismodule)]
    written = {rule.name for module in modules for rule in rules_of(module)}
    assert written == set(BY_NAME)
    assert len(RULES) == len(BY_NAME)


def rules_of(module: ModuleType) -> list[Rule]:
    return [value for _, value in inspect.getmembers(module) if isinstance(value, Rule)]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_reason_is_a_clause_with_a_source(rule: Rule) -> None:
    assert rule.sources
    assert len(rule.reason) < 140
    assert not rule.reason.endswith(".")


@pytest.mark.parametrize(
    "path", recipe_paths(recipes_root()), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_a_shipped_recipe_breaks_no_rule(path: Path) -> None:
    assert legality_problems(Loader(root=recipes_root(), rules=()).recipe(path)) == ()
