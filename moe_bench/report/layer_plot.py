"""A sweep of loads over one MoE layer as a picture: what unequal experts cost, part by part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

from moe_bench.report.figures import MILLI
from moe_bench.report.layer_view import EXCHANGE, experts_s, imbalance_ratio
from moe_bench.results.layer_record import LayerRecord

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_LOOKS = MappingProxyType(
    {
        "whole": ("#1d5c99", "o", "-"),
        "experts": ("#a0460e", "s", "--"),
        "router, permute and unpermute": ("#4d6b1f", "D", ":"),
        "dispatch and combine": ("#6d7177", "^", "-."),
    }
)
"""Colour, marker and line, so that no reader depends on one of the three."""


def write_sweep_plot(records: Sequence[LayerRecord], path: Path) -> None:
    """Draw milliseconds over the load of the busiest expert into `path`, one panel per engine; the suffix
    says how.
    """
    # half a second of import that no other verb should pay for
    from matplotlib.figure import Figure

    engines = list(dict.fromkeys(record.engine for record in records))
    figure = Figure(figsize=(4.8 * len(engines), 4.0), layout="constrained")
    for place, engine in zip(figure.subplots(1, len(engines), squeeze=False).flat, engines, strict=True):
        _draw_panel(place, [record for record in records if record.engine == engine])
    figure.savefig(path, dpi=160)


def curves_ms(records: Sequence[LayerRecord]) -> dict[str, list[float]]:
    """What is drawn: forward and backward milliseconds of the whole and of its parts, record by record."""
    moved = ("router", "permute", "unpermute")
    return {
        "whole": [record.whole.median_s / MILLI for record in records],
        "experts": [experts_s(record) / MILLI for record in records],
        "router, permute and unpermute": [_parts_ms(record, moved) for record in records],
        "dispatch and combine": [_parts_ms(record, EXCHANGE) for record in records],
    }


def _parts_ms(record: LayerRecord, names: Sequence[str]) -> float:
    return sum(part.median_s for part in record.parts if part.part in names) / MILLI


def _draw_panel(place: Axes, records: Sequence[LayerRecord]) -> None:
    records = sorted(records, key=imbalance_ratio)
    loads = [imbalance_ratio(record) for record in records]
    for name, values in curves_ms(records).items():
        colour, marker, line = _LOOKS[name]
        place.plot(loads, values, color=colour, marker=marker, linestyle=line, linewidth=1.1, label=name)
    for load, record in zip(loads, records, strict=True):
        place.annotate(
            record.case.routing.label,
            (load, record.whole.median_s / MILLI),
            xytext=(2, 5),
            textcoords="offset points",
            fontsize=6.5,
            # neighbouring loads are closer than their names are long
            rotation=30,
        )
    place.margins(x=0.12)
    place.spines[["top", "right"]].set_visible(False)
    machine = records[0].provenance.gpu.name + (", toy sizes" if records[0].is_tiny else "")
    place.set_title(f"{records[0].case.name}\n{records[0].engine}, {machine}", fontsize=9, loc="left")
    place.grid(axis="y", color="#e4e1da", linewidth=0.6)
    place.set_ylim(0, 1.2 * max(record.whole.median_s for record in records) / MILLI)
    place.set_xlabel("rows of the busiest expert here over the mean", fontsize=8)
    place.set_ylabel("forward and backward (ms)", fontsize=8)
    place.tick_params(labelsize=8)
    place.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(-0.05, -0.13), ncols=2)
