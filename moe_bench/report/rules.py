"""The legality rules as documentation: a Markdown table for each group, with reasons and sources."""

from __future__ import annotations

from collections.abc import Sequence

from moe_bench.spec.legality import GROUPS, Rule


def rules_markdown() -> str:
    """Every rule, under the sentence that its module opens with; `docs/check.md` holds this text."""
    parts = []
    for group in GROUPS:
        sentence = (group.__doc__ or "").splitlines()[0].rstrip(".")
        rows = "\n".join(_row(rule) for rule in group.RULES)
        parts.append(f"### {sentence}\n\n| rule | reason | source |\n|---|---|---|\n{rows}")
    return "\n\n".join(parts)


def _row(rule: Rule) -> str:
    return f"| `{rule.name}` | {rule.reason} | {_cited(rule.sources)} |"


def _cited(sources: Sequence[str]) -> str:
    """The sources with each file named once: `megatron/core/parallel_state.py:922, 1447`."""
    lines_of: dict[str, list[str]] = {}
    for source in sources:
        file, colon, line = source.rpartition(":")
        is_line = bool(colon) and line.isdecimal()
        lines_of.setdefault(file if is_line else source, []).extend([line] if is_line else [])
    return "; ".join(f"`{file}:{', '.join(lines)}`" if lines else file for file, lines in lines_of.items())
