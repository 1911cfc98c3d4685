"""What is to be reached on one H100 beside what was measured, as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.report.figures import TERA
from moe_bench.results.reach import GPU, Reach

_VERDICTS = {None: "not measured", True: "reached", False: "missed"}


def reach_view(figures: Sequence[Reach], predicted: Mapping[str, float]) -> RenderableType:
    """A line for each figure, then how many are reached; `predicted` is by figure, before any measurement."""
    rows = tuple(
        (
            one.what,
            f"{'>=' if one.is_at_least else '<='} {_text(one.target, one)}",
            _text(predicted[one.what], one) if one.what in predicted else "-",
            "-" if one.measured is None else _text(one.measured, one),
            one.by or "-",
            _VERDICTS[one.is_reached],
        )
        for one in figures
    )
    counts = {verdict: sum(one.is_reached is verdict for one in figures) for verdict in (True, False, None)}
    line = f"{counts[True]} reached, {counts[False]} missed, {counts[None]} not measured on an {GPU}"
    headings = ("figure", "to reach", "predicted", "measured", "by", "verdict")
    return Group(
        Columns(headings=headings, rows=rows, right=frozenset({"predicted", "measured"})), Text(), Text(line)
    )


def reach_json(figures: Sequence[Reach], predicted: Mapping[str, float]) -> list[dict[str, object]]:
    """`reach_view` as JSON: fractions, ratios and FLOP/s as numbers."""
    return [
        {
            "what": one.what,
            "target": one.target,
            "is_at_least": one.is_at_least,
            "unit": one.unit,
            "predicted": predicted.get(one.what),
            "measured": one.measured,
            "by": one.by,
            "is_reached": one.is_reached,
        }
        for one in figures
    ]


def _text(value: float, one: Reach) -> str:
    if one.unit == "flops_per_s":
        return f"{value / TERA:.0f} TFLOP/s"
    return f"{value:.1%}" if one.unit == "fraction" else f"{value:.2f}"
