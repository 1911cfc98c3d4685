"""docs/check.md holds the rules that are asked, and numbers that are true."""

from __future__ import annotations

import re
from pathlib import Path

from moe_bench.spec.legality import RULES
from tests.harness.legality_exceptions import BEYOND

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "check.md").read_text()


def test_every_rule_is_documented_once() -> None:
    assert sorted(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == sorted(rule.name for rule in RULES)


def test_the_number_of_rules_that_megatron_core_does_not_answer_is_true() -> None:
    assert f"{len(BEYOND)} of the {len(RULES)} rules" in PAGE
