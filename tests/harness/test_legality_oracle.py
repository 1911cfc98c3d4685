"""`check` and Megatron-Core agree on 2,000 layouts and on every example: what is refused, and at which line.

Where Megatron-Core accepts what `check` refuses, the rule stands in BEYOND with the reason. The other way
round there is no exception: whatever Megatron-Core refuses, a broken rule cites the refusing statement.
"""

from __future__ import annotations

from collections import Counter

import pytest

from moe_bench.errors import BadInputError
from moe_bench.spec.legality import RULES, legality_problems
from moe_bench.spec.recipe import Recipe
from tests.harness.legality_exceptions import BEYOND
from tests.harness.legality_layouts import layouts
from tests.harness.legality_oracle import (
    ROOT,
    Asked,
    Refusal,
    built_layers,
    counted_layers,
    on_the_machine,
    refusal,
    statements,
)
from tests.spec.examples import Example, examples

NUM_LAYOUTS = 2000
SOURCES = {rule.name: rule.sources for rule in RULES}


def broken_rules(recipe: Recipe) -> set[str]:
    return {problem.rule for problem in legality_problems(recipe)}


def disagreement(broken: set[str], answer: Refusal | None) -> str | None:
    """Why check and Megatron-Core do not say the same; None where they do."""
    if answer is None:
        unnamed = broken - set(BEYOND)
        return f"Megatron-Core accepts what {sorted(unnamed)} refuse" if unnamed else None
    cited = {source for rule in broken for source in SOURCES[rule]}
    if answer.where in cited:
        return None
    return f"{answer.where} refuses ({answer.message}), broken rules are {sorted(broken)}"


def test_check_and_megatron_core_agree_on_2000_layouts() -> None:
    disagreements, answers = [], Counter[str]()
    for name, recipe in layouts(NUM_LAYOUTS):
        broken, answer = broken_rules(recipe), refusal(recipe)
        said = disagreement(broken, answer)
        if said is not None:
            disagreements.append(f"{name}: {said}")
        if answer is None and not broken:
            with on_the_machine(recipe):
                built = built_layers(Asked(recipe))
            if built != counted_layers(recipe):
                disagreements.append(f"{name}: stages hold {built}, counted {counted_layers(recipe)}")
        answers["legal" if not broken else "refused" if answer else "beyond"] += 1
    assert not disagreements, "\n".join(disagreements[:10])
    # a generator that drew only one kind would prove nothing
    assert min(answers["legal"], answers["refused"]) > NUM_LAYOUTS // 5


def asked_of_megatron_core() -> tuple[Example, ...]:
    """All but structures that Megatron-Core has and the harness does not build."""
    return tuple(example for example in examples() if example.rule != "built_structure")


@pytest.mark.parametrize("example", asked_of_megatron_core(), ids=str)
def test_megatron_core_refuses_each_example_at_the_cited_line(example: Example) -> None:
    answer = refusal(example.broken())
    if answer is None:
        assert example.rule in BEYOND
    else:
        assert answer.where in SOURCES[example.rule], answer.message


@pytest.mark.parametrize("example", examples(), ids=str)
def test_megatron_core_accepts_each_cured_example(example: Example) -> None:
    assert refusal(example.cured()) is None


def test_a_structure_that_the_harness_does_not_build_never_reaches_megatron_core() -> None:
    broken = [example.broken() for example in examples() if example.rule == "built_structure"]
    assert broken
    for recipe in broken:
        with pytest.raises(BadInputError, match="for accounting and projection only"):
            refusal(recipe)


def test_every_rule_beyond_the_oracle_is_needed() -> None:
    """A rule leaves BEYOND as soon as Megatron-Core refuses all its examples itself."""
    reached = {
        rule: all(refusal(example.broken()) for example in examples() if example.rule == rule)
        for rule in BEYOND
    }
    assert [rule for rule, is_reached in reached.items() if is_reached] == []


MEGATRON_SOURCES = sorted({source for sources in SOURCES.values() for source in sources if ".py:" in source})


@pytest.mark.parametrize("source", [source for source in MEGATRON_SOURCES if source.startswith("megatron/")])
def test_a_cited_line_begins_a_statement_of_the_supported_release(source: str) -> None:
    path, _, line = source.rpartition(":")
    assert int(line) in {first for first, _, _ in statements(ROOT / path)}
