"""A simulated pipeline step as a picture: a row per pipeline rank, a bar per pass, idle time left open."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from moe_bench.projection.schedule.shape import PassKind
from moe_bench.projection.schedule.timeline import Slot, Timeline
from moe_bench.report.html.axis import Axis, Place, Tick, linear, round_range, ticks
from moe_bench.report.html.chart import (
    BOTTOM_PX,
    LEFT_PX,
    RIGHT_PX,
    TOP_PX,
    Band,
    Chart,
    Data,
    Mark,
    legend_of,
)

MAX_ROW_PX, MIN_ROW_PX, MIN_PLOT_PX = 22.0, 11.0, 60.0
BAR_FRACTION = 0.82
MIN_SLOT_PX = 2.0
"""Narrower slots are not drawn one by one but as shares of time."""
BIN_PX = 5.3
"""Then, of this much of the time axis; 60 to the width of a chart."""
NUM_LEVELS = 8
"""Steps in which a share is drawn, so that equal neighbours become one bar."""
PASSES = {
    "forward": "forward pass",
    "backward": "backward pass",
    "dgrad": "gradient of the input",
    "wgrad": "gradient of the weights",
    "merged": "forward and backward pass merged",
}
"""By role."""
_ROLES = {
    PassKind.FORWARD: "forward",
    PassKind.BACKWARD: "backward",
    PassKind.DGRAD: "dgrad",
    PassKind.WGRAD: "wgrad",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plot:
    """Where ranks and instants stand."""

    x: Place
    row_px: float

    def top_px(self, rank: int) -> float:
        return TOP_PX + self.row_px * (rank + (1 - BAR_FRACTION) / 2)

    @property
    def bar_px(self) -> float:
        return self.row_px * BAR_FRACTION


def pipeline_picture(key: str, timeline: Timeline) -> Chart:
    """The step of `timeline` on all pipeline ranks.

    Where passes are too short to be seen, a bar stands for a piece of time, and its height for the share of
    it that the rank spends on such passes: what is open above it is idle.
    """
    num_ranks = timeline.shape.num_ranks
    row_px = max(MIN_PLOT_PX / num_ranks, min(MAX_ROW_PX, max(MIN_ROW_PX, 220 / num_ranks)))
    height_px = round(TOP_PX + row_px * num_ranks + BOTTOM_PX)
    unit, per_s = ("ms", 1e3) if timeline.total_s < 1 else ("s", 1.0)
    x = linear(0, timeline.total_s, start_px=LEFT_PX, end_px=RIGHT_PX)
    plot = _Plot(x=x, row_px=row_px)
    rows = [list(timeline.slots(rank)) for rank in range(num_ranks)]
    is_binned = max(map(len, rows)) * MIN_SLOT_PX > RIGHT_PX - LEFT_PX
    draw = _shares if is_binned else _bars
    marks = tuple(mark for rank, row in enumerate(rows) for mark in draw(plot, rank, row, timeline.total_s))
    values = [
        value for value in round_range(0, timeline.total_s * per_s) if value <= timeline.total_s * per_s
    ]
    return Chart(
        key=key,
        title=f"Pipeline of one step, {_layout(timeline)}",
        caption=_caption(timeline, is_binned=is_binned),
        height_px=height_px,
        x=Axis(title=f"time ({unit})", ticks=ticks(values, lambda value: x(value / per_s))),
        y=Axis(title="pipeline rank", ticks=tuple(_rank_ticks(plot, num_ranks))),
        y_grid=False,
        bands=tuple(
            Band(
                role="idle",
                x_px=LEFT_PX,
                y_px=plot.top_px(rank),
                width_px=RIGHT_PX - LEFT_PX,
                height_px=plot.bar_px,
            )
            for rank in range(num_ranks)
        ),
        marks=marks,
        legend=legend_of(marks, PASSES),
        data=_data(timeline),
    )


def _bars(plot: _Plot, rank: int, slots: Sequence[Slot], _total_s: float) -> Iterator[Mark]:
    for slot in slots:
        start_px, end_px = plot.x(slot.start_s), plot.x(slot.end_s)
        yield Mark(
            shape="bar",
            role=_role(slot),
            x_px=start_px,
            y_px=plot.top_px(rank),
            width_px=end_px - start_px,
            height_px=plot.bar_px,
            tip=f"rank {rank}: {PASSES[_role(slot)]}, {_passes_text(slot)}",
        )


def _shares(plot: _Plot, rank: int, slots: Sequence[Slot], total_s: float) -> Iterator[Mark]:
    """Equal pieces of time, as stacks of what the rank does in them; equal neighbours are drawn as one."""
    num_bins = round((RIGHT_PX - LEFT_PX) / BIN_PX)
    shares = binned_fractions(slots, num_bins=num_bins, total_s=total_s)
    stacks = [_levels({role: shares[role][place] for role in PASSES}) for place in range(num_bins)]
    level_px = plot.bar_px / NUM_LEVELS
    for levels, places in groupby(range(num_bins), key=stacks.__getitem__):
        first, *_, last = [*places] * 2
        start_px, end_px = (plot.x(place * total_s / num_bins) for place in (first, last + 1))
        bottom_px = plot.top_px(rank) + plot.bar_px
        for role, num_levels in zip(PASSES, levels, strict=True):
            if num_levels:
                bottom_px -= num_levels * level_px
                mean = sum(shares[role][first : last + 1]) / (last + 1 - first)
                yield Mark(
                    shape="bar",
                    role=role,
                    x_px=start_px,
                    y_px=bottom_px,
                    width_px=end_px - start_px,
                    height_px=num_levels * level_px,
                    tip=f"rank {rank}: {PASSES[role]}, {mean:.0%} of this time",
                )


def binned_fractions(slots: Sequence[Slot], *, num_bins: int, total_s: float) -> dict[str, list[float]]:
    """By role: the share of each of `num_bins` equal pieces of the step that goes into its passes."""
    bin_s = total_s / num_bins
    shares = {role: [0.0] * num_bins for role in PASSES}
    for slot in slots:
        row = shares[_role(slot)]
        first, last = (min(num_bins - 1, int(instant_s / bin_s)) for instant_s in (slot.start_s, slot.end_s))
        for place in range(first, last + 1):
            inside_s = min(slot.end_s, (place + 1) * bin_s) - max(slot.start_s, place * bin_s)
            row[place] += max(0.0, inside_s) / bin_s
    return shares


def _levels(shares: dict[str, float]) -> tuple[int, ...]:
    """Heights in levels, rounded from the bottom up, so that the whole stack is as high as the busy share."""
    heights, busy_fraction = [0], 0.0
    for share in shares.values():
        busy_fraction += share
        heights.append(round(busy_fraction * NUM_LEVELS))
    return tuple(above - below for below, above in pairwise(heights))


def _rank_ticks(plot: _Plot, num_ranks: int) -> Iterator[Tick]:
    for rank in range(num_ranks):
        yield Tick(position_px=TOP_PX + plot.row_px * (rank + 0.5), label=str(rank))


def _role(slot: Slot) -> str:
    return "merged" if len(slot.work) > 1 else _ROLES[slot.work[0].kind]


def _passes_text(slot: Slot) -> str:
    return " and ".join(f"chunk {one.chunk}, micro batch {one.micro_batch}" for one in slot.work)


def _layout(timeline: Timeline) -> str:
    shape = timeline.shape
    chunks = f" x {shape.num_virtual} chunks" if shape.num_virtual > 1 else ""
    return f"PP{shape.num_ranks}{chunks}, {shape.num_micro_batches} micro batches"


def _caption(timeline: Timeline, *, is_binned: bool) -> str:
    how = "The height of a bar is the share of time spent so. " if is_binned else ""
    return (
        f"{timeline.shape.kind.label}; simulated, not measured. {how}Open space is idle: "
        f"{timeline.bubble_fraction:.1%} of all ranks' time, transfers between ranks included."
    )


def _data(timeline: Timeline) -> Data:
    return Data(
        headings=("pipeline rank", "busy (ms)", "idle (ms)", "idle", "chunks in flight, at most"),
        rows=tuple(
            (
                str(rank),
                f"{1e3 * busy_s:.1f}",
                f"{1e3 * idle_s:.1f}",
                f"{idle_s / timeline.total_s:.1%}",
                str(timeline.max_in_flight[rank]),
            )
            for rank, (busy_s, idle_s) in enumerate(zip(timeline.busy_s, timeline.bubble_s, strict=True))
        ),
    )
