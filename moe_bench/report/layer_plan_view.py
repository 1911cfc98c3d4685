"""What the projection says of MoE layers before they are measured: milliseconds of the parts, and rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.projection.isolated_layer import isolated_parts
from moe_bench.report.columns import Columns
from moe_bench.report.figures import MILLI, TERA
from moe_bench.report.layer_view import PUBLISHED_NOTE, published_rates
from moe_bench.results.layer_record import gated_flops
from moe_bench.spec.derive_layer import layer_recipe
from moe_bench.spec.layer_case import LayerCase
from moe_bench.spec.recipe import KernelSpec
from moe_bench.spec.system import SystemSpec

PARTS = ("router", "permute and unpermute", "fc1", "activation", "fc2", "shared experts")
_FUSIONS = ("router", "permute", "activation")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLayer:
    """One layer with balanced loads, on one GPU of a system, without the exchange between ranks."""

    case: LayerCase
    seconds: Mapping[tuple[str, str], float]
    """By part and pass."""

    def total_s(self, *parts: str) -> float:
        """Of these parts, or of all, both passes."""
        return sum(value for (part, _), value in self.seconds.items() if not parts or part in parts)

    @property
    def forward_s(self) -> float:
        """Forward pass of the whole."""
        return sum(value for (_, in_pass), value in self.seconds.items() if in_pass == "forward")

    @property
    def rates_flops_per_s(self) -> tuple[float, float]:
        """Experts' operations over the time of the layer, forward and backward."""
        flops = gated_flops(self.case, num_rows=self.case.num_rows)
        return flops / self.forward_s, 2 * flops / (self.total_s() - self.forward_s)


def planned_layers(cases: Sequence[LayerCase], system: SystemSpec) -> tuple[PlannedLayer, ...]:
    """What the laws of `system` give; BadInputError where it has no GPU."""
    return tuple(
        PlannedLayer(case=case, seconds=isolated_parts(layer_recipe(case, system), load=1.0))
        for case in cases
    )


def layer_plan_view(layers: Sequence[PlannedLayer], system: SystemSpec) -> RenderableType:
    """A table with a line per layer: milliseconds of its parts, and rates beside published ones."""
    shown = [part for part in PARTS if any(layer.total_s(part) for layer in layers)]
    published = [published_rates(layer.case.name) for layer in layers]
    sources = ("Megatron f/b", "SonicMoE f/b") if any(published) else ()
    rates = ("forward TFLOP/s", "backward TFLOP/s")
    headings = ("layer", "kernels", *(f"{part} ms" for part in shown), "all ms", *rates, *sources)
    rows = tuple(
        (
            layer.case.name,
            kernels_text(layer.case.kernels),
            *(f"{layer.total_s(part) / MILLI:.3f}" for part in shown),
            f"{layer.total_s() / MILLI:.3f}",
            *(f"{rate / TERA:.0f}" for rate in layer.rates_flops_per_s),
            *(reversed(there) if there else ("-",) * len(sources)),
        )
        for layer, there in zip(layers, published, strict=True)
    )
    return Group(
        Columns(headings=headings, rows=rows, right=frozenset(headings[2:])),
        Text(),
        Text(f"projected for {system.key}: balanced loads, no exchange; +: fused kernels"),
        *((Text(PUBLISHED_NOTE),) if sources else ()),
    )


def kernels_text(kernels: KernelSpec) -> str:
    """`torch_native +router +permute`, or `torch_native, one by one`."""
    if not kernels.grouped_gemm:
        return f"{kernels.family}, one by one"
    fusions = [name for name in _FUSIONS if getattr(kernels.fusions, name)]
    return " ".join((kernels.family, *(f"+{name}" for name in fusions)))


def layer_plan_json(layers: Sequence[PlannedLayer]) -> list[dict[str, object]]:
    """The layers as JSON: case, seconds by part and pass, and FLOP/s."""
    return [
        {
            "case": layer.case.model_dump(mode="json"),
            "parts": [
                {"part": part, "in_pass": in_pass, "seconds": seconds}
                for (part, in_pass), seconds in layer.seconds.items()
            ],
            "total_s": layer.total_s(),
            "forward_flops_per_s": layer.rates_flops_per_s[0],
            "backward_flops_per_s": layer.rates_flops_per_s[1],
        }
        for layer in layers
    ]
