"""Scaling curves as tables: one per curve on a terminal, one for all as Markdown and CSV."""

from __future__ import annotations

import string
from collections.abc import Sequence

import pandas as pd
from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.report.scaling import EFFICIENCY, Curve, Efficiency, Kind, MissingPoint, Point, Scaling

COLUMNS = (
    "model",
    "system",
    "precision",
    "seq_len",
    "mode",
    "kind",
    "curve",
    "num_gpus",
    "global_batch_size",
    "layout",
    "tokens_per_s_per_gpu",
    "efficiency_pct",
    "efficiency_low_pct",
    "efficiency_high_pct",
    "recipe_or_row",
    "remark",
)

NO_INTERVAL = "published and projected points have no repeats, so no interval"


def scaling_frame(scaling: Scaling) -> pd.DataFrame:
    """One row per point, curve by curve, by size; sizes without a number have the reason as their remark."""
    rows = [row for curve in scaling.curves for row in _rows(curve)]
    rows += [_missing_row(point, mode="", curve="") for point in scaling.missing]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _rows(curve: Curve) -> list[dict[str, object]]:
    rows = [_row(curve, one) for one in curve.efficiencies]
    rows += [
        _missing_row(point, mode=str(curve.mode), curve=curve.name)
        for point in (*curve.missing, *curve.lost_repeats)
    ]
    # stable: the fastest of a size stays first, and its lost repeats come last
    return sorted(rows, key=lambda row: int(str(row["num_gpus"])))


def _row(curve: Curve, one: Efficiency) -> dict[str, object]:
    point = one.point
    return {
        **_asked(point, mode=str(curve.mode), kind=curve.kind, curve=curve.name),
        "tokens_per_s_per_gpu": point.tokens_per_s_per_gpu,
        "efficiency_pct": one.efficiency_ratio * 100,
        "efficiency_low_pct": None if one.low_ratio is None else one.low_ratio * 100,
        "efficiency_high_pct": None if one.high_ratio is None else one.high_ratio * 100,
        "remark": point.remark,
    }


def _missing_row(point: MissingPoint, *, mode: str, curve: str) -> dict[str, object]:
    return {**_asked(point, mode=mode, kind=Kind.MEASURED, curve=curve), "remark": missing_text(point)}


def _asked(point: Point, *, mode: str, kind: Kind, curve: str) -> dict[str, object]:
    """What a row says of a point whether or not it has a number."""
    subject = point.subject
    return {
        "model": subject.model,
        "system": subject.system,
        "precision": subject.precision,
        "seq_len": subject.seq_len,
        "mode": mode,
        "kind": str(kind),
        "curve": curve,
        "num_gpus": point.num_gpus,
        "global_batch_size": point.global_batch_size,
        "layout": point.layout,
        "recipe_or_row": point.label,
    }


def scaling_view(scaling: Scaling) -> RenderableType:
    """A small table per curve, under what efficiency means, over the families that make no curve."""
    parts: list[RenderableType] = [Text(f"{EFFICIENCY}; {NO_INTERVAL}")]
    if not scaling.curves:
        parts.append(
            Text("no two results of one family differ in size at equal batch or equal batch per GPU")
        )
    parts += [_curve_table(curve) for curve in scaling.curves]
    parts += _missing_lines(scaling.missing)
    if scaling.unscaled:
        names = ", ".join(scaling.unscaled)
        parts.append(Text(f"\nseveral sizes, but neither equal batch nor equal batch per GPU: {names}"))
    return Group(*parts)


def curve_title(curve: Curve) -> str:
    """Mode, subject, kind and name."""
    return f"{curve.mode} scaling of {curve.subject} ({curve.kind}: {curve.name})"


def curve_letter(index: int) -> str:
    """`a` to `z`, then `aa`, `bb`, ...: what the curves of one plot are called."""
    rounds, place = divmod(index, len(string.ascii_lowercase))
    return string.ascii_lowercase[place] * (rounds + 1)


def _missing_lines(points: Sequence[MissingPoint]) -> list[RenderableType]:
    """Runs that left no number and belong to no curve."""
    if not points:
        return []
    lines = [
        f"  {point.num_gpus} GPUs, {point.label}: {missing_text(point)}"
        for point in sorted(points, key=lambda point: (point.subject, point.num_gpus, point.label))
    ]
    return [Text("\n".join(["\nno run of these families left a number:", *lines]))]


def _curve_table(curve: Curve) -> RenderableType:
    numbers = ("GPUs", "GBS", "tokens/s/GPU", "efficiency", "95 % interval")
    lines = [(one.point.num_gpus, _measured_cells(one)) for one in curve.efficiencies]
    lines += [(point.num_gpus, _missing_cells(point)) for point in curve.missing]
    table = Columns(
        headings=("recipe or row", *numbers, "layout"),
        rows=tuple(cells for _, cells in sorted(lines, key=lambda line: line[0])),
        right=frozenset(numbers),
        is_stacked=True,
    )
    lost = [Text(lost_repeat_text(point)) for point in curve.lost_repeats]
    return Group(Text("\n" + curve_title(curve), style="italic"), table, *lost)


def missing_text(point: MissingPoint) -> str:
    """What became of the jobs of a size that left no number."""
    return point.reason if point.num_jobs == 1 else f"{point.reason} (the newest of {point.num_jobs} jobs)"


def lost_repeat_text(point: MissingPoint) -> str:
    """That a size whose number comes from other runs has jobs without one."""
    return f"not in the number of {point.num_gpus} GPUs: {missing_text(point)}"


def _measured_cells(one: Efficiency) -> tuple[str, ...]:
    point = one.point
    return (
        point.label,
        str(point.num_gpus),
        str(point.global_batch_size),
        f"{'~' if point.remark else ''}{point.tokens_per_s_per_gpu:,.0f}",
        f"{one.efficiency_ratio:.1%}",
        interval_text(one),
        point.layout or "-",
    )


def _missing_cells(point: MissingPoint) -> tuple[str, ...]:
    return (
        f"{point.label}: {missing_text(point)}",
        str(point.num_gpus),
        str(point.global_batch_size),
        *("-", "-", "-"),
        point.layout or "-",
    )


def interval_text(one: Efficiency) -> str:
    """`97.1% to 98.4%`, or a dash."""
    if one.low_ratio is None or one.high_ratio is None:
        return "-"
    return f"{one.low_ratio:.1%} to {one.high_ratio:.1%}"
