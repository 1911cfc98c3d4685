"""Two settings of a recipe as people compare them, and what all comparisons say of a recipe."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.results.parity import Evidence, Parity
from moe_bench.spec.scale import Plan

COMMAND = "moe-bench parity --plain RECIPE --scale smoke --data PREFIX"
MARKS: Mapping[str, str] = {
    "unproven": f"nobody has shown that these settings learn like plain ones; {COMMAND}",
    "partly": "what runs without a GPU learns like the plain setting; moe-bench show RECIPE names the rest",
    "differs": "these settings do not learn like plain ones; moe-bench show RECIPE says from which step on",
}
"""What the marks in tables mean; `equal` says it itself."""
MAX_STEPS = 12
"""Of a table; all of them are in the record."""
_HEADINGS = ("step", "base", "variant", "difference", "tolerance")
_NORM_HEADINGS = ("norm", "norm of variant", "its difference", "its tolerance")


def parity_view(parity: Parity, path: Path) -> RenderableType:
    """Some of the steps, the verdict, what the tolerance comes from, and where the record lies."""
    base = parity.base.plan
    num_ranks = [side.plan.num_ranks for side in (parity.base, parity.variant)]
    headings = (_HEADINGS + _NORM_HEADINGS)[: 1 + 4 * len(parity.curves)]
    table = Columns(
        headings=headings,
        rows=tuple(_row(parity, index) for index in steps_shown(parity)),
        right=frozenset(headings),
    )
    notes = (
        verdict_text(parity),
        f"base {base.asked} at {base.scale} scale ({num_ranks[0]} processes), variant "
        f"{' '.join(parity.varied)} ({num_ranks[1]} processes)",
        f"tolerance: {len(parity.repeats)} repeats of the base whose first weights are off by "
        f"{parity.nudge_fraction:.2g} of themselves",
        f"record: {path}",
    )
    return Group(table, *(Text(note) for note in notes))


def verdict_text(parity: Parity) -> str:
    """`equal` with what could have been seen, or `differs` with the first step that does."""
    curve = parity.first_different
    if curve is None or (step := curve.first_different_step) is None:
        return f"equal over {len(parity.base.learned.losses)} steps; {_unseen_text(parity)} would not be seen"
    base, variant = curve.base_values[step - 1], curve.variant_values[step - 1]
    return (
        f"differs from step {step}: {curve.name} {base:.6f} and {variant:.6f}, apart by "
        f"{abs(base - variant):.2g} where rounding explains {curve.tolerance_values[step - 1]:.2g}"
    )


def _unseen_text(parity: Parity) -> str:
    parts = (
        f"{curve.tolerance_values[-1] / curve.base_values[-1]:.2g} of the {curve.name}"
        for curve in parity.curves
    )
    return f"less than {' and '.join(parts)}"


def steps_shown(parity: Parity) -> Sequence[int]:
    """Indices of at most about MAX_STEPS steps: evenly spread, the last, and the first that differs."""
    num_steps = len(parity.base.learned.losses)
    shown = {*range(0, num_steps, -(-num_steps // MAX_STEPS)), num_steps - 1}
    steps = (curve.first_different_step for curve in parity.curves)
    return sorted(shown | {step - 1 for step in steps if step is not None})


def _row(parity: Parity, index: int) -> tuple[str, ...]:
    cells = [str(index + 1)]
    for curve in parity.curves:
        base, variant = curve.base_values[index], curve.variant_values[index]
        cells += [
            f"{base:.6f}",
            f"{variant:.6f}",
            f"{variant - base:+.1e}",
            f"{curve.tolerance_values[index]:.1e}",
        ]
    return tuple(cells)


def parity_json(parity: Parity, path: Path) -> dict[str, object]:
    """The record itself, with what follows from it."""
    return {
        "path": str(path),
        "is_equal": parity.is_equal,
        "curves": [
            {
                "name": curve.name,
                "first_different_step": curve.first_different_step,
                "tolerances": curve.tolerance_values,
            }
            for curve in parity.curves
        ],
        **parity.model_dump(mode="json"),
    }


def marks_notes(marks: Iterable[str]) -> tuple[str, ...]:
    """Under a table: what its marks mean."""
    seen = set(marks)
    return tuple(f"{mark}: {meaning}" for mark, meaning in MARKS.items() if mark in seen)


def evidence_line(evidence: Evidence | None, plan: Plan) -> str:
    """What a recipe or run states of the last comparison of its settings with plain ones, in a few lines."""
    if evidence is None:
        if plan.recipe.routing_is_causal:
            return f"unproven: {MARKS['unproven'].replace('RECIPE', plan.asked)}"
        return "unproven: where a token's experts depend on later tokens, losses are not compared"
    first = evidence.comparisons[0].variant.plan
    lines = [
        f"{evidence.verdict}: with the plain setting at {first.scale} scale ({first.num_ranks} processes)"
    ]
    lines += [
        f"{parity.variant.plan.recipe.precision} {verdict_text(parity)} "
        f"({parity.provenance.started_at[:10]}, {parity.provenance.git.short_name})"
        for parity in evidence.comparisons
    ]
    if gaps := evidence.precision_gaps:
        worst = max(range(len(gaps)), key=lambda step: abs(gaps[step]))
        precision = evidence.comparisons[-1].variant.plan.recipe.precision
        lines.append(
            f"{precision} itself is off fp32 by at most {abs(gaps[worst]):.1e} nats (step {worst + 1}), "
            f"by {abs(gaps[-1]):.1e} in the last step"
        )
    if evidence.unseen:
        lines.append(f"unproven: {grouped(evidence.unseen)}")
    return "\n".join(lines)


def grouped(settings: Iterable[str]) -> str:
    """`field=value` texts by what they belong to: `kernels (family=transformer_engine, fusions.rope)`."""
    groups: dict[str, list[str]] = {}
    for setting in settings:
        field, _, value = setting.partition("=")
        group, _, name = field.partition(".")
        text = name if value == "True" else f"{name or group}={value}"
        groups.setdefault(group, []).append(text)
    return ", ".join(
        parts[0] if parts[0].startswith(f"{group}=") else f"{group} ({', '.join(parts)})"
        for group, parts in groups.items()
    )


def evidence_view(found: Mapping[str, Evidence], skipped: Mapping[str, str]) -> RenderableType:
    """One line per recipe: verdict, what each precision would not have seen, and what nobody compared.

    `skipped` says of recipes without evidence why they have none.
    """
    headings = ("recipe", "parity", "processes", "FP32", "own precision", "unproven")
    rows = tuple(
        (
            name,
            evidence.verdict,
            str(evidence.comparisons[0].variant.plan.num_ranks),
            *_cells(evidence),
            grouped(evidence.unseen),
        )
        for name, evidence in found.items()
    )
    notes = [*(f"{name}: not compared: {why}" for name, why in skipped.items())]
    if rows:
        notes.insert(
            0, "by precision: the share of the loss, and of the gradient norm, that would not be seen"
        )
    table = Columns(headings=headings, rows=rows, right=frozenset({"processes"})) if rows else Text()
    return Group(table, *(Text(note) for note in notes))


def _cells(evidence: Evidence) -> tuple[str, str]:
    by_precision = {
        "fp32" if parity.variant.plan.recipe.precision == "fp32" else "own": _cell(parity)
        for parity in evidence.comparisons
    }
    return by_precision.get("fp32", "-"), by_precision.get("own", "-")


def _cell(parity: Parity) -> str:
    if (curve := parity.first_different) is not None:
        return f"{curve.name} differs from step {curve.first_different_step}"
    return ", ".join(f"{curve.tolerance_values[-1] / curve.base_values[-1]:.1e}" for curve in parity.curves)


def evidence_json(found: Mapping[str, Evidence], skipped: Mapping[str, str]) -> dict[str, object]:
    """`evidence_view` as JSON; the comparisons themselves are in their records."""
    return {
        "recipes": {
            name: {"parity": evidence.verdict, "unproven": list(evidence.unseen)}
            for name, evidence in found.items()
        },
        "not_compared": dict(skipped),
    }
