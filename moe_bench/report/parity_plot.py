"""Two settings of a recipe as a picture: losses, and differences beside what rounding explains."""

from __future__ import annotations

from pathlib import Path

from moe_bench.report.parity_view import parity_mark
from moe_bench.results.parity import Parity


def write_parity_plot(parity: Parity, path: Path) -> None:
    """Draw losses, and differences beside what rounding explains, into `path`."""
    # half a second of import that no other verb should pay for
    from matplotlib.figure import Figure

    base, variant = parity.base.losses, parity.variant.losses
    steps = range(1, len(base) + 1)
    figure = Figure(figsize=(9.6, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, base, color="#1d5c99", linewidth=1.6, label="base")
    left.plot(steps, variant, color="#a0460e", linewidth=1.1, linestyle="--", label="variant")
    left.set_ylabel("loss (nats per token)", fontsize=8)
    figure.suptitle(f"{parity.base.plan.asked}: {' '.join(parity.varied)}", fontsize=9, wrap=True)
    left.set_title("loss", fontsize=9, loc="left")
    for repeat in parity.repeats:
        apart = [abs(one - other) for one, other in zip(repeat, base, strict=True)]
        right.plot(steps, apart, color="#6d7177", linewidth=0.6, linestyle=":")
    right.plot(steps, parity.tolerances, color="#4d6b1f", linewidth=1.1, label="tolerance")
    apart = [abs(one - other) for one, other in zip(variant, base, strict=True)]
    right.plot(
        steps, apart, color="#a0460e", marker="o", markersize=2.5, linewidth=0.9, label="variant - base"
    )
    # differences of no bit at all stand on the axis
    right.set_yscale("symlog", linthresh=min(parity.tolerances) / 100)
    right.set_ylim(bottom=0)
    right.set_title(f"{parity_mark(parity)}; dotted: repeats of the base", fontsize=9, loc="left")
    for place in (left, right):
        place.spines[["top", "right"]].set_visible(False)
        place.set_xlabel("step", fontsize=8)
        place.tick_params(labelsize=8)
        place.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=160)
