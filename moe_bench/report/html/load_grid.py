"""The heat map of expert load, experts by layers, of a benchmark run as of a training run."""

from __future__ import annotations

from collections.abc import Sequence

from moe_bench.report.html.axis import Axis, whole_axis
from moe_bench.report.html.chart import BOTTOM_PX, LEFT_PX, RIGHT_PX, TOP_PX, Cells, Chart, Data, LegendEntry

LOAD_BOUNDS = (0.5, 2 / 3, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
"""Tokens over the layer's mean at which the colour of a cell changes; fixed, so that runs can be compared."""
LOAD_CLASSES = (
    "below 0.50",
    "0.50 to 0.67",
    "0.67 to 0.80",
    "0.80 to 0.95",
    "0.95 to 1.05",
    "1.05 to 1.25",
    "1.25 to 1.50",
    "1.50 to 2.00",
    "2.00 and above",
)
_MIN_GRID_PX, _MAX_GRID_PX = 60, 260


def load_ratios(tokens_per_expert: Sequence[int]) -> tuple[float, ...]:
    """Of one layer, each expert's tokens over the mean; zeros where there was no token."""
    mean = sum(tokens_per_expert) / len(tokens_per_expert)
    return tuple(tokens / mean if mean else 0.0 for tokens in tokens_per_expert)


def load_grid(key: str, loads: Sequence[Sequence[float]], *, names: Sequence[str], over: str) -> Chart:
    """Experts by layers, coloured by `loads`: tokens over the layer's mean, [layer][expert].

    `names` are those of the layers, for the table; `over` says which steps were counted. Raises ValueError
    without a layer.
    """
    num_layers, num_experts = len(loads), max(len(layer) for layer in loads)
    cell_width = (RIGHT_PX - LEFT_PX) / num_experts
    grid_height = min(_MAX_GRID_PX, max(_MIN_GRID_PX, num_layers * cell_width, num_layers * 3))
    cell_height = grid_height / num_layers
    classes = tuple(tuple(_load_class(load) for load in layer) for layer in loads)
    return Chart(
        key=key,
        title="Expert load: experts by layers",
        caption=f"Tokens of each of {num_experts} experts over the mean of its layer, {over}.",
        height_px=round(TOP_PX + grid_height) + BOTTOM_PX,
        x=Axis(
            title="expert",
            ticks=whole_axis(0, num_experts - 1, lambda expert: LEFT_PX + (expert + 0.5) * cell_width),
        ),
        y=Axis(
            title="expert layer",
            ticks=whole_axis(0, num_layers - 1, lambda layer: TOP_PX + (layer + 0.5) * cell_height),
        ),
        y_grid=False,
        cells=Cells(
            rows=classes,
            x_px=LEFT_PX,
            y_px=TOP_PX,
            cell_width_px=cell_width,
            cell_height_px=cell_height,
        ),
        legend=tuple(
            LegendEntry(role=f"c{index}", shape="bar", text=f"{text} ×")
            for index, text in enumerate(LOAD_CLASSES)
            if any(index in row for row in classes)
        ),
        data=Data(
            headings=(
                "expert layer",
                "busiest expert",
                "its load (× mean)",
                "idlest expert",
                "its load (× mean)",
            ),
            rows=tuple(
                (
                    name,
                    str(layer.index(max(layer))),
                    f"{max(layer):.3f}",
                    str(layer.index(min(layer))),
                    f"{min(layer):.3f}",
                )
                for name, layer in zip(names, loads, strict=True)
            ),
        ),
    )


def _load_class(load: float) -> int:
    return sum(load >= bound for bound in LOAD_BOUNDS)
