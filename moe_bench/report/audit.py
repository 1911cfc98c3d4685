"""One run under every published way of counting FLOPs: how many, and which terms differ from ours."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_bench.analysis.flops import FlopsCounting, defines, step_flops_by_part
from moe_bench.report.figures import TERA
from moe_bench.results.flops_convention import CONVENTIONS, FlopsConvention
from moe_bench.results.metrics import COUNTING
from moe_bench.spec.recipe import Recipe

AUDITED = (
    FlopsConvention.MCORE,
    FlopsConvention.BRIDGE_GPTOSS_NEW,
    FlopsConvention.BRIDGE_GPTOSS_OLD,
    FlopsConvention.MCORE_FULL_ATTENTION,
    FlopsConvention.AUTOMODEL,
    FlopsConvention.DGXC,
    FlopsConvention.TORCHTITAN,
    FlopsConvention.DERIVED,
)
"""The conventions that somebody has written down, and the one that counts nothing (docs/registry.md)."""

GFLOPS = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """Forward and backward of one optimizer step, over the whole job, in one convention."""

    step_flops: int
    token_flops: float
    """Per trained token."""
    to_ours_ratio: float
    differences: Mapping[str, float]
    """FLOPs per token that each part has more (+) or less (-) than ours; equal parts are absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditLine:
    """One convention and what it makes of a recipe."""

    convention: FlopsConvention
    meaning: str
    source: str
    is_ours: bool
    count: Count | None
    """None where the convention has no formula, or none for the model's attention."""


def audit_lines(recipe: Recipe) -> tuple[AuditLine, ...]:
    """`recipe` under each of the eight conventions, in the order of `AUDITED`."""
    ours = _by_part(recipe, COUNTING)
    lines = []
    for convention in AUDITED:
        rule = CONVENTIONS[convention]
        is_counted = rule.counting is not None and defines(rule.counting, recipe.model)
        lines.append(
            AuditLine(
                convention=convention,
                meaning=rule.meaning,
                source=rule.source,
                is_ours=rule.counting is COUNTING,
                count=_count(recipe, rule.counting, ours) if is_counted and rule.counting else None,
            )
        )
    return tuple(lines)


def _count(recipe: Recipe, counting: FlopsCounting, ours: Mapping[str, int]) -> Count:
    theirs = _by_part(recipe, counting)
    total = sum(theirs.values())
    more = {part: theirs.get(part, 0) - ours.get(part, 0) for part in dict.fromkeys((*ours, *theirs))}
    return Count(
        step_flops=total,
        token_flops=total / recipe.tokens_per_step,
        to_ours_ratio=total / sum(ours.values()),
        differences={part: flops / recipe.tokens_per_step for part, flops in more.items() if flops},
    )


def _by_part(recipe: Recipe, counting: FlopsCounting) -> dict[str, int]:
    parts = step_flops_by_part(recipe, counting=counting)
    return {str(part): flops.total_flops for part, flops in parts.items()}


def audit_view(lines: tuple[AuditLine, ...], *, tokens_per_s_per_gpu: float | None) -> RenderableType:
    """A table for people: GFLOPs per token, TFLOPs per step, ratio to ours, and the terms that differ."""
    headings = ["convention", "GFLOPs/token", "TFLOPs/step", "of ours"]
    title = None
    if tokens_per_s_per_gpu is not None:
        headings.append("TFLOPs/GPU")
        title = f"TFLOPs/GPU at {tokens_per_s_per_gpu:,g} tokens/s/GPU"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "convention" else "right")
    table.add_column("more or less than ours, GFLOPs/token", overflow="fold")
    for line in lines:
        label = f"{line.convention} (ours)" if line.is_ours else str(line.convention)
        if line.count is None:
            blanks = ["-"] * (len(headings) - 1)
            table.add_row(label, *blanks, f"no count: {line.meaning}")
            continue
        cells = [
            f"{line.count.token_flops / GFLOPS:.2f}",
            f"{line.count.step_flops / TERA:,.0f}",
            f"{line.count.to_ours_ratio:.4f}",
        ]
        if tokens_per_s_per_gpu is not None:
            cells.append(f"{tokens_per_s_per_gpu * line.count.token_flops / TERA:.1f}")
        table.add_row(label, *cells, _terms(line.count) or "-")
    return Group(table, Text("what each convention contains: docs/accounting.md", style="dim"))


def _terms(count: Count) -> str:
    return ", ".join(f"{part} {flops / GFLOPS:+.3g}" for part, flops in count.differences.items())


def audit_json(
    recipe: Recipe, lines: tuple[AuditLine, ...], *, tokens_per_s_per_gpu: float | None
) -> dict[str, object]:
    """`audit_view` as JSON, with the units in the names."""
    return {
        "recipe": recipe.name,
        "seq_len": recipe.seq_len,
        "num_mtp_layers": recipe.num_mtp_layers,
        "tokens_per_step": recipe.tokens_per_step,
        "ours": str(COUNTING),
        "conventions": [_line_json(line, tokens_per_s_per_gpu) for line in lines],
    }


def _line_json(line: AuditLine, tokens_per_s_per_gpu: float | None) -> dict[str, object]:
    head: dict[str, object] = {
        "convention": str(line.convention),
        "is_ours": line.is_ours,
        "meaning": line.meaning,
        "source": line.source,
    }
    count = line.count
    if count is None:
        return head | {"gflops_per_token": None}
    numbers: dict[str, object] = {
        "gflops_per_token": count.token_flops / GFLOPS,
        "step_tflops": count.step_flops / TERA,
        "ratio_to_ours": count.to_ours_ratio,
        "differences_gflops_per_token": {part: more / GFLOPS for part, more in count.differences.items()},
    }
    if tokens_per_s_per_gpu is not None:
        numbers["tflops_per_gpu"] = tokens_per_s_per_gpu * count.token_flops / TERA
    return head | numbers
