"""The memory of every pipeline stage of a recipe, part by part, beside what the GPU can hold."""

from __future__ import annotations

from collections.abc import Iterable

from moe_bench.analysis.memory import MemoryFit, RankMemory, needed_bytes
from moe_bench.analysis.memory_verdict import verdict
from moe_bench.report.figures import GIB
from moe_bench.report.html.axis import Axis, Place, Tick, linear, round_range, ticks
from moe_bench.report.html.chart import (
    BOTTOM_PX,
    LEFT_PX,
    RIGHT_PX,
    Chart,
    Data,
    Mark,
    Note,
    Stroke,
    legend_of,
)

TOP_PX = 24
"""Room above the bars for the words on the limit."""
MIN_PLOT_PX = 48
MAX_ROW_PX = 30
BAR_FRACTION = 0.66
MIN_BAR_PX = 0.5
"""Of a part that is there: a few megabytes of many gigabytes would round to nothing."""

MEMORY_PARTS = {
    "weights": "weights",
    "gradients": "gradients",
    "optimizer": "optimizer states",
    "activations": "activations",
    "transient": "transients",
    "margin": "margins: context, fragmentation, buffers, CUDA graphs",
}


def memory_chart(key: str, fit: MemoryFit) -> Chart:
    """The closed form of analysis/memory.py, a bar per pipeline stage."""
    row_px = max(MIN_PLOT_PX / len(fit.ranks), min(MAX_ROW_PX, 200 / len(fit.ranks)))
    height = round(TOP_PX + row_px * len(fit.ranks) + BOTTOM_PX)
    usable_gib, worst_gib = fit.usable_bytes / GIB, needed_bytes(fit.worst) / GIB
    values = round_range(0, max(usable_gib, worst_gib))
    x = linear(0, values[-1], start_px=LEFT_PX, end_px=RIGHT_PX)
    marks = tuple(
        mark for row, rank in enumerate(fit.ranks) for mark in _bar(rank, x, TOP_PX + row_px * row, row_px)
    )
    return Chart(
        key=key,
        title="Memory per GPU, by pipeline stage",
        caption=f"Closed form, not measured. The fullest stage needs {worst_gib:.1f} of {usable_gib:.1f} "
        f"GiB, margins included: {verdict(fit)}.",
        height_px=height,
        top_px=TOP_PX,
        x=Axis(title="memory (GiB)", ticks=ticks(values, x)),
        y=Axis(
            title="stage",
            ticks=tuple(
                Tick(position_px=TOP_PX + row_px * (row + 0.5), label=str(rank.pipeline_rank))
                for row, rank in enumerate(fit.ranks)
            ),
        ),
        y_grid=False,
        x_grid=True,
        marks=marks,
        strokes=(
            Stroke(
                role="limit", points_px=((x(usable_gib), TOP_PX - 4), (x(usable_gib), height - BOTTOM_PX))
            ),
        ),
        notes=(Note(text=f"{usable_gib:.1f} GiB usable", x_px=x(usable_gib), y_px=TOP_PX - 9, anchor="end"),),
        legend=legend_of(marks, MEMORY_PARTS),
        data=Data(
            headings=("stage", *(f"{part} (GiB)" for part in MEMORY_PARTS)),
            rows=tuple(
                (str(rank.pipeline_rank), *(f"{size / GIB:.2f}" for size in memory_parts(rank).values()))
                for rank in fit.ranks
            ),
        ),
    )


def memory_parts(rank: RankMemory) -> dict[str, int]:
    """Bytes of each part of MEMORY_PARTS; together they are what the rank needs."""
    return {
        "weights": rank.weights_bytes,
        "gradients": rank.gradients_bytes,
        "optimizer": rank.optimizer_bytes,
        "activations": rank.activations_bytes,
        "transient": rank.transient_bytes,
        "margin": needed_bytes(rank) - rank.total_bytes,
    }


def _bar(rank: RankMemory, x: Place, top_px: float, row_px: float) -> Iterable[Mark]:
    before_bytes = 0
    for part, size_bytes in memory_parts(rank).items():
        if size_bytes:
            start_px, end_px = x(before_bytes / GIB), x((before_bytes + size_bytes) / GIB)
            yield Mark(
                shape="bar",
                role=part,
                x_px=start_px,
                y_px=top_px + row_px * (1 - BAR_FRACTION) / 2,
                width_px=max(end_px - start_px, MIN_BAR_PX),
                height_px=row_px * BAR_FRACTION,
                tip=f"stage {rank.pipeline_rank}: {MEMORY_PARTS[part]} {size_bytes / GIB:.2f} GiB",
            )
        before_bytes += size_bytes
