"""The experts of a training run as people read them: a line per layer, what was alarming, and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.report.columns import Columns
from moe_bench.report.figures import steps_text
from moe_bench.results.training_health import HealthLine, LayerHealth

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_ALARMS = 20
"""Shown, the last ones; all are in health.jsonl."""
_HEADINGS = ("layer", "entropy", "busiest", "its share", "balance", "dropped", "dead", "bias")


def health_view(lines: Sequence[HealthLine]) -> RenderableType:
    """The last line, layer by layer, and the alarms of all."""
    last = lines[-1]
    table = Columns(
        headings=_HEADINGS,
        rows=tuple(_row(layer) for layer in last.layers),
        right=frozenset(_HEADINGS[1:]),
    )
    alarms = [alarm for line in lines for alarm in line.alarms]
    hidden = len(alarms) - MAX_ALARMS
    notes = [
        f"{steps_text(last.step - last.num_steps + 1, last.step)}; entropy over that of an even load, shares "
        "of the layer's tokens",
        *([f"{hidden} earlier alarms are not shown"] if hidden > 0 else []),
        *(f"ALARM {alarm.text}" for alarm in alarms[-MAX_ALARMS:]),
        *([] if alarms else ["no alarms"]),
    ]
    return Group(table, *(Text(note) for note in notes))


def _row(layer: LayerHealth) -> tuple[str, ...]:
    entropy, dropped, bias = layer.entropy_fraction, layer.dropped_fraction, layer.expert_bias_range
    return (
        layer.layer,
        "-" if entropy is None else f"{entropy:.4f}",
        str(layer.busiest_expert),
        f"{layer.busiest_share_fraction:.1%}",
        f"{layer.top_k / len(layer.tokens_per_expert):.1%}",
        "-" if dropped is None else f"{dropped:.2%}",
        str(len(layer.dead_experts)),
        "-" if bias is None else f"{bias[0]:+.4f} to {bias[1]:+.4f}",
    )


def health_json(lines: Sequence[HealthLine]) -> list[dict[str, object]]:
    """Every line for programs, with what follows from the counts."""
    return [
        {
            "step": line.step,
            "num_steps": line.num_steps,
            "alarms": [alarm.model_dump() for alarm in line.alarms],
            "layers": [
                {
                    **layer.model_dump(),
                    "entropy_fraction": layer.entropy_fraction,
                    "busiest_share_fraction": layer.busiest_share_fraction,
                    "dropped_fraction": layer.dropped_fraction,
                    "dead_experts": layer.dead_experts,
                }
                for layer in line.layers
            ],
        }
        for line in lines
    ]


def load_ratios(line: HealthLine) -> list[list[float]]:
    """What the heatmap shows: tokens of every expert over the mean of its layer, [layer][expert].

    Layers of fewer experts are filled up with what is not a number, which is left blank.
    """
    most = max(len(layer.tokens_per_expert) for layer in line.layers)
    return [
        [tokens * len(layer.tokens_per_expert) / max(1, sum(layer.tokens_per_expert)) for tokens in counts]
        + [float("nan")] * (most - len(counts))
        for layer in line.layers
        for counts in [layer.tokens_per_expert]
    ]


def write_health_plot(lines: Sequence[HealthLine], path: Path) -> None:
    """Draw the load of the last line, experts by layers, and the entropy of all lines into `path`."""
    # half a second of import that no other verb should pay for
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw_loads(left, lines[-1])
    _draw_entropies(right, lines)
    for place in (left, right):
        place.tick_params(labelsize=8)
    figure.savefig(path, dpi=160)


def _draw_loads(place: Axes, line: HealthLine) -> None:
    from matplotlib.colors import TwoSlopeNorm

    # fixed ends, so that runs can be compared: nothing, balance, four times the mean and above
    norm = TwoSlopeNorm(vmin=0, vcenter=1, vmax=4)
    image = place.imshow(load_ratios(line), aspect="auto", cmap="PuOr_r", norm=norm, interpolation="nearest")
    bar = place.figure.colorbar(image, ax=place)
    bar.set_label("tokens over the layer's mean, up to 4", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    place.set_yticks(range(len(line.layers)), [layer.layer for layer in line.layers])
    over = steps_text(line.step - line.num_steps + 1, line.step)
    place.set_title(f"expert load, {over}", fontsize=9, loc="left")
    place.set_xlabel("expert", fontsize=8)


def _draw_entropies(place: Axes, lines: Sequence[HealthLine]) -> None:
    from matplotlib.ticker import MaxNLocator

    names = [layer.layer for layer in lines[-1].layers]
    for index, name in enumerate(names):
        steps = [line.step for line in lines]
        values = [line.layers[index].entropy_fraction for line in lines]
        shade = 0.15 + 0.7 * index / max(1, len(names) - 1)
        known = [float("nan") if value is None else value for value in values]
        place.plot(steps, known, color=(0.1, 0.25, shade), linewidth=0.9, label=name)
    for line in lines:
        if line.alarms:
            place.axvline(line.step, color="#a0460e", linewidth=0.4, linestyle=":")
    place.spines[["top", "right"]].set_visible(False)
    place.set_ylim(0, 1.02)
    place.set_title("entropy of the load; dotted: alarms", fontsize=9, loc="left")
    place.set_xlabel("step", fontsize=8)
    place.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(names) <= 10:
        place.legend(fontsize=7, frameon=False)
