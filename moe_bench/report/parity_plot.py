"""Comparisons of settings as a picture: both curves, and differences beside what rounding explains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from moe_bench.results.parity import Curve, Parity

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_BLUE, _RED, _GREY, _GREEN = "#1d5c99", "#a0460e", "#6d7177", "#4d6b1f"
MAX_TITLE = 160
"""Characters of what a variant changes."""


def write_parity_plot(parities: Sequence[Parity], path: Path) -> None:
    """Draw a row for each of `parities` into `path`: losses, and how far they and the norms are apart."""
    # half a second of import that no other verb should pay for
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 3.6 * len(parities)), layout="constrained")
    for parity, row in zip(parities, figure.subfigures(len(parities), 1, squeeze=False)[:, 0], strict=True):
        changes = " ".join(parity.varied)
        if len(changes) > MAX_TITLE:
            changes = f"{changes[:MAX_TITLE]} ..."
        precision = parity.variant.plan.recipe.precision
        row.suptitle(f"{parity.base.plan.asked}, variant in {precision}: {changes}", fontsize=8, wrap=True)
        places = row.subplots(1, 1 + len(parity.curves))
        _draw_both(places[0], parity.curves[0])
        for place, curve in zip(places[1:], parity.curves, strict=True):
            _draw_difference(place, curve)
        for place in places:
            place.spines[["top", "right"]].set_visible(False)
            place.set_xlabel("step", fontsize=8)
            place.xaxis.get_major_locator().set_params(integer=True)
            place.tick_params(labelsize=8)
            place.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=160)


def _draw_both(place: Axes, curve: Curve) -> None:
    steps = range(1, len(curve.base_values) + 1)
    place.plot(steps, curve.base_values, color=_BLUE, linewidth=1.6, label="base")
    place.plot(steps, curve.variant_values, color=_RED, linewidth=1.1, linestyle="--", label="variant")
    place.set_title(f"{curve.name} (nats per token)", fontsize=9, loc="left")


def _draw_difference(place: Axes, curve: Curve) -> None:
    steps = range(1, len(curve.base_values) + 1)
    for repeat in curve.repeat_values:
        place.plot(steps, _apart(repeat, curve.base_values), color=_GREY, linewidth=0.6, linestyle=":")
    place.plot(steps, curve.tolerance_values, color=_GREEN, linewidth=1.1, label="tolerance")
    apart = _apart(curve.variant_values, curve.base_values)
    place.plot(steps, apart, color=_RED, marker="o", markersize=2.5, linewidth=0.9, label="|variant - base|")
    # differences of no bit at all stand on the axis
    place.set_yscale("symlog", linthresh=min(curve.tolerance_values) / 100)
    place.set_ylim(bottom=0)
    verdict = (
        "equal" if curve.first_different_step is None else f"differs from step {curve.first_different_step}"
    )
    place.set_title(f"{curve.name}: {verdict}; dotted: repeats of the base", fontsize=9, loc="left")


def _apart(one: Sequence[float], other: Sequence[float]) -> list[float]:
    return [abs(left - right) for left, right in zip(one, other, strict=True)]
