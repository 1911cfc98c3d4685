"""Scaling curves as tables: one per curve on a terminal, one for all as Markdown and CSV."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moe_bench.report.scaling import EFFICIENCY, Curve, Efficiency, Scaling

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


def scaling_frame(curves: Sequence[Curve]) -> pd.DataFrame:
    """One row per point, curve by curve, by size."""
    rows = [_row(curve, one) for curve in curves for one in curve.efficiencies]
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _row(curve: Curve, one: Efficiency) -> dict[str, object]:
    point, subject = one.point, curve.subject
    return {
        "model": subject.model,
        "system": subject.system,
        "precision": subject.precision,
        "seq_len": subject.seq_len,
        "mode": str(curve.mode),
        "kind": str(curve.kind),
        "curve": curve.name,
        "num_gpus": point.num_gpus,
        "global_batch_size": point.global_batch_size,
        "layout": point.layout,
        "tokens_per_s_per_gpu": point.tokens_per_s_per_gpu,
        "efficiency_pct": one.efficiency_ratio * 100,
        "efficiency_low_pct": None if one.low_ratio is None else one.low_ratio * 100,
        "efficiency_high_pct": None if one.high_ratio is None else one.high_ratio * 100,
        "recipe_or_row": point.label,
        "remark": point.remark,
    }


def scaling_view(scaling: Scaling) -> RenderableType:
    """A small table per curve, under what efficiency means, over the families that make no curve."""
    parts: list[RenderableType] = [Text(f"{EFFICIENCY}; {NO_INTERVAL}")]
    if not scaling.curves:
        parts.append(
            Text("no two results of one family differ in size at equal batch or equal batch per GPU")
        )
    parts += [_curve_table(curve) for curve in scaling.curves]
    if scaling.unscaled:
        names = ", ".join(scaling.unscaled)
        parts.append(Text(f"\nseveral sizes, but neither equal batch nor equal batch per GPU: {names}"))
    return Group(*parts)


def curve_title(curve: Curve) -> str:
    """Mode, subject, kind and name."""
    return f"{curve.mode} scaling of {curve.subject} ({curve.kind}: {curve.name})"


def _curve_table(curve: Curve) -> Table:
    table = Table(
        box=None, pad_edge=False, header_style="bold", title="\n" + curve_title(curve), title_justify="left"
    )
    for heading in ("GPUs", "GBS", "tokens/s/GPU", "efficiency", "95 % interval"):
        table.add_column(heading, justify="right")
    for heading in ("layout", "recipe or row"):
        table.add_column(heading, overflow="fold")
    for one in curve.efficiencies:
        point = one.point
        table.add_row(
            str(point.num_gpus),
            str(point.global_batch_size),
            f"{'~' if point.remark else ''}{point.tokens_per_s_per_gpu:,.0f}",
            f"{one.efficiency_ratio:.1%}",
            interval_text(one),
            point.layout or "-",
            point.label,
        )
    return table


def interval_text(one: Efficiency) -> str:
    """`97.1% to 98.4%`, or a dash."""
    if one.low_ratio is None or one.high_ratio is None:
        return "-"
    return f"{one.low_ratio:.1%} to {one.high_ratio:.1%}"
