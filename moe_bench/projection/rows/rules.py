"""Every rule that fills what a published row leaves open, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Iterator

from moe_bench.projection.rows.case import Rule
from moe_bench.projection.rows.memory_rules import MEMORY_RULES
from moe_bench.projection.rows.run_rules import OVERLAP_RULES, ROUTING_RULES
from moe_bench.projection.rows.size_rules import BATCH_RULES, GRID_RULES, STAGE_RULES
from moe_bench.projection.rows.state_rules import PRECISION_RULES, STATE_RULES

STAGES: tuple[tuple[tuple[Rule, ...], tuple[tuple[str, str], ...]], ...] = (
    (
        PRECISION_RULES + GRID_RULES,
        (
            ("precision", "no precision"),
            ("parallel.num_gpus", "no number of GPUs"),
            ("seq_len", "no sequence length"),
            ("parallel.tensor", "unknown layout: no TP"),
            ("parallel.pipeline", "unknown layout: no PP"),
            ("parallel.expert", "unknown layout: no EP"),
        ),
    ),
    (BATCH_RULES, (("global_batch_size", "no batch"), ("micro_batch_size", "no micro batch"))),
    (STAGE_RULES + ROUTING_RULES + OVERLAP_RULES + MEMORY_RULES + STATE_RULES, ()),
)
"""Rules in the order in which they are tried, and after each group the fields without which a row is not
projectable. The first rule of a field that applies fills it; later rules read earlier fields."""

RULES: tuple[Rule, ...] = tuple(rule for rules, _ in STAGES for rule in rules)

RECIPE_RULE = "recipe"
"""Name of the assumption that copies a field from a recipe that reproduces the row."""


def rule_table() -> str:
    """The rules as a table in Markdown, for docs/row_inference.md."""
    return "\n".join(_lines())


def _lines() -> Iterator[str]:
    yield "| field | rule | when | then | evidence |"
    yield "|---|---|---|---|---|"
    for rule in RULES:
        evidence = f"*at the release:* {rule.evidence}" if rule.is_of_release else rule.evidence
        cells = (f"`{rule.field}`", rule.name, rule.when, rule.then, evidence)
        yield "| " + " | ".join(cells) + " |"
