"""One MoE layer as people read it: parts beside predictions, rates, marks; suites and sweeps of loads."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from moe_bench.analysis.layer_bytes import permute_bytes, router_bytes, unpermute_bytes
from moe_bench.projection.isolated_layer import isolated_parts
from moe_bench.report.columns import Columns
from moe_bench.report.figures import MILLI, TERA
from moe_bench.report.layer_peers_view import layer_peers_json, layer_peers_view
from moe_bench.results.layer_record import PASSES, LayerRecord
from moe_bench.results.sonicmoe import sonic_shape
from moe_bench.spec.derive_layer import layer_recipe
from moe_bench.spec.system import SystemSpec

EXCHANGE = ("dispatch", "combine")
MOVED = ("router", "permute", "unpermute")
PRODUCTS = ("fc1", "fc2")
_NONE = "-"
_PERMUTATION = "permute and unpermute"
PUBLISHED_NOTE = (
    "SonicMoE, Megatron: forward/backward TFLOP/s on one H100, read off figure 14 of arXiv:2512.14080, +-5"
)

Predicted = Mapping[tuple[str, str], float]
"""Seconds by part and pass, as `isolated_parts` names them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartLine:
    """One part of the layer: medians by pass, their sum, and what it is held against."""

    part: str
    seconds: Mapping[str, float]
    total_s: float
    share_fraction: float
    predicted_s: float | None
    """None where the projection has no such part alone, or no rates of this machine."""
    floor_s: float | None
    """Bytes that it must move at the copy speed of the same run; None for what computes."""


def predicted_parts(record: LayerRecord, system: SystemSpec) -> Predicted:
    """What the projection says of the layer on `system`; nothing where that has no GPU."""
    if system.gpu is None:
        return {}
    balanced = record.case.num_rows
    load = sum(record.local_tokens_per_expert) / balanced
    return isolated_parts(layer_recipe(record.case, system), load=load)


def part_lines(record: LayerRecord, predicted: Predicted) -> tuple[PartLine, ...]:
    """Every part in the order in which it first ran."""
    seconds: dict[str, dict[str, float]] = {
        name: {part.in_pass: part.median_s for part in record.parts if part.part == name}
        for name in dict.fromkeys(part.part for part in record.parts)
    }
    floors = _floors_s(record)
    return tuple(
        PartLine(
            part=name,
            seconds=passes,
            total_s=sum(passes.values()),
            share_fraction=sum(passes.values()) / record.whole.median_s,
            predicted_s=sum(value for (part, _), value in predicted.items() if part == name) or None,
            floor_s=floors.get(name),
        )
        for name, passes in seconds.items()
    )


def layer_view(record: LayerRecord, predicted: Predicted) -> RenderableType:
    """Parts, then the whole and what follows from it, then what is to be said of it."""
    lines = part_lines(record, predicted)
    headings = (
        "part",
        *(f"{name} ms" for name in PASSES),
        "all ms",
        "share",
        "predicted ms",
        "ratio",
        "x floor",
    )
    rows = [*(_row(line) for line in lines), *_sums(record, lines, predicted)]
    return Group(
        Text(record.case.name, style="bold"),
        Text(_case_text(record)),
        Text(),
        Columns(headings=headings, rows=tuple(rows), right=frozenset(headings[1:])),
        Text(),
        *(Text(line) for line in _facts(record, lines)),
        *(Text(f"! {mark}", style="yellow") for mark in record.marks),
        *(() if record.peers is None else (Text(), layer_peers_view(record.peers))),
    )


def layer_json(record: LayerRecord, predicted: Predicted, path: str | None) -> dict[str, object]:
    """The record, and what the view computes from it."""
    return {
        "path": path,
        "record": record.model_dump(mode="json"),
        "whole_s": record.whole.median_s,
        "parts_s": record.parts_s,
        "graphed_s": None if record.graphed is None else record.graphed.median_s,
        "residual_fraction": record.residual_fraction,
        "marks": list(record.marks),
        "forward_flops_per_s": record.forward_flops_per_s,
        "backward_flops_per_s": record.backward_flops_per_s,
        "parts": [
            {
                "part": line.part,
                "seconds": dict(line.seconds),
                "predicted_s": line.predicted_s,
                "floor_s": line.floor_s,
                "share_fraction": line.share_fraction,
            }
            for line in part_lines(record, predicted)
        ],
        "predicted": [
            {"part": part, "in_pass": in_pass, "seconds": seconds}
            for (part, in_pass), seconds in predicted.items()
        ],
        "peers": None if record.peers is None else layer_peers_json(record.peers),
    }


def suite_view(records: Sequence[LayerRecord]) -> RenderableType:
    """A line for each layer: rates of both passes, and where the suite has published ones, those beside."""
    headings = (
        "layer",
        "engine",
        "forward TFLOP/s",
        "backward TFLOP/s",
        "SonicMoE f/b",
        "Megatron f/b",
        "residual",
        "marks",
    )
    rows = tuple(
        (
            record.case.name,
            record.engine,
            _tera(record.forward_flops_per_s),
            _tera(record.backward_flops_per_s),
            *(published_rates(record.case.name) or (_NONE, _NONE)),
            f"{record.residual_fraction:+.1%}",
            str(len(record.marks)),
        )
        for record in records
    )
    return Group(
        Columns(headings=headings, rows=rows, right=frozenset(headings[2:])),
        Text(),
        Text(PUBLISHED_NOTE),
    )


def sweep_view(records: Sequence[LayerRecord]) -> RenderableType:
    """A line for each load, the first one being what the others are held against."""
    headings = (
        "routing",
        "busiest / mean",
        "rows here",
        "forward ms",
        "backward ms",
        "experts ms",
        "x first",
    )
    first_s = records[0].whole.median_s
    rows = tuple(
        (
            record.case.routing.label,
            f"{imbalance_ratio(record):.2f}",
            str(sum(record.local_tokens_per_expert)),
            _milli(statistics.median(record.whole.forward_s)),
            _milli(statistics.median(record.whole.backward_s)),
            _milli(experts_s(record)),
            f"{record.whole.median_s / first_s:.2f}",
        )
        for record in records
    )
    return Columns(headings=headings, rows=rows, right=frozenset(headings[1:]))


def imbalance_ratio(record: LayerRecord) -> float:
    """Rows of this rank's busiest expert over the mean that every expert of all ranks gets."""
    mean = record.case.num_rows / record.case.num_local_experts
    return max(record.local_tokens_per_expert) / mean


def experts_s(record: LayerRecord) -> float:
    """Products and activation of the routed experts, both passes."""
    return sum(part.median_s for part in record.parts if part.part in (*PRODUCTS, "activation", "experts"))


def published_rates(name: str) -> tuple[str, str] | None:
    """SonicMoE's and Megatron's published TFLOP/s of the layer of this name, forward/backward, if any."""
    if (shape := sonic_shape(name)) is None:
        return None
    first, second = (
        f"{rate.forward_flops_per_s / TERA:.0f}/{rate.backward_flops_per_s / TERA:.0f}"
        for rate in (shape.sonicmoe, shape.megatron)
    )
    return first, second


def _row(line: PartLine) -> tuple[str, ...]:
    ratio = _NONE if line.predicted_s is None else f"{line.total_s / line.predicted_s:.2f}"
    return (
        line.part,
        *(_milli(line.seconds[name]) if name in line.seconds else _NONE for name in PASSES),
        _milli(line.total_s),
        f"{line.share_fraction:.1%}",
        _NONE if line.predicted_s is None else _milli(line.predicted_s),
        ratio,
        _NONE if line.floor_s is None else f"{line.total_s / line.floor_s:.2f}",
    )


def _sums(record: LayerRecord, lines: Sequence[PartLine], predicted: Predicted) -> Iterator[tuple[str, ...]]:
    both = sum(line.total_s for line in lines if line.part in ("permute", "unpermute"))
    both_s = sum(value for (part, _), value in predicted.items() if part == _PERMUTATION) or None
    whole_s, parts_s = record.whole.median_s, record.parts_s
    within = sum(predicted.values()) or None
    without_exchange_s = whole_s - sum(line.total_s for line in lines if line.part in EXCHANGE)
    blank = (_NONE,) * len(PASSES)
    yield (_PERMUTATION, *blank, *_held_against(both, both_s, whole_s))
    yield ("all parts", *blank, *_held_against(parts_s, None, whole_s))
    yield ("residual", *blank, *_held_against(whole_s - parts_s, None, whole_s))
    forward, backward = (
        _milli(statistics.median(one)) for one in (record.whole.forward_s, record.whole.backward_s)
    )
    whole = (forward, backward, *blank[2:])
    yield ("whole", *whole, *_held_against(whole_s, None, whole_s))
    yield ("whole without exchange", *blank, *_held_against(without_exchange_s, within, whole_s))


def _held_against(seconds: float, predicted_s: float | None, whole_s: float) -> tuple[str, ...]:
    return (
        _milli(seconds),
        f"{seconds / whole_s:.1%}",
        _NONE if predicted_s is None else _milli(predicted_s),
        _NONE if predicted_s is None else f"{seconds / predicted_s:.2f}",
        _NONE,
    )


def _case_text(record: LayerRecord) -> str:
    case, moe = record.case, record.case.moe
    experts = f"{moe.num_experts} experts, top-{moe.top_k}"
    here = "" if case.ep_size == 1 else f", {case.num_local_experts} here of EP{case.ep_size}"
    shared = f", shared {moe.shared_expert_ffn_hidden_size}" if moe.shared_expert_ffn_hidden_size else ""
    return (
        f"{case.num_tokens} tokens x {case.hidden_size}, {experts}{here}, width "
        f"{moe.expert_ffn_hidden_size}{shared}; {case.routing.label}; {case.precision}; {record.engine} "
        f"({record.implementation}) on {record.provenance.gpu.name}"
    )


def _facts(record: LayerRecord, lines: Sequence[PartLine]) -> Iterator[str]:
    yield (
        f"experts' operations over the layer's time: forward {_tera(record.forward_flops_per_s)} TFLOP/s, "
        f"backward {_tera(record.backward_flops_per_s)}"
    )
    products_s = sum(line.total_s for line in lines if line.part in PRODUCTS)
    if record.dense_flops_per_s and products_s:
        rate = (record.forward_flops + record.backward_flops) / products_s
        yield (
            f"expert GEMMs: {_tera(rate)} TFLOP/s, {rate / record.dense_flops_per_s:.0%} of one large dense "
            f"product in the same run ({_tera(record.dense_flops_per_s)})"
        )
    yield (
        f"marks add {record.marking_fraction:+.1%} to a call; of a marked call "
        f"{record.parts_s / record.marked.median_s:.1%} is in parts"
    )
    moved = sum(line.share_fraction for line in lines if line.part in MOVED)
    yield f"router, permute and unpermute together: {moved:.1%} of the layer"
    if (there := published_rates(record.case.name)) is not None:
        yield f"published for this layer: SonicMoE {there[0]}, Megatron {there[1]} TFLOP/s"
        yield PUBLISHED_NOTE
    if record.graphed is not None and record.launch_fraction is not None:
        yield (
            f"captured as CUDA graphs: {_milli(record.graphed.median_s)} ms, "
            f"{record.launch_fraction:.1%} of the layer less"
        )
    if (held := record.held) is not None:
        yield (
            f"held for {held.held_for_s:g} s: {held.slowdown_fraction:+.1%} on a call in a burst "
            f"({_milli(statistics.median(held.burst_s))} ms)"
        )
    yield from (f"not split: {what}: {why}" for what, why in record.unreachable.items())
    yield from record.differences


def _floors_s(record: LayerRecord) -> dict[str, float]:
    if record.copy_bytes_per_s is None:
        return {}
    received = sum(record.local_tokens_per_expert)
    moved: dict[str, int] = {
        "router": router_bytes(record.case),
        "permute": permute_bytes(record.case, num_received_rows=received),
        "unpermute": unpermute_bytes(record.case, num_received_rows=received),
    }
    return {name: num_bytes / record.copy_bytes_per_s for name, num_bytes in moved.items()}


def _milli(seconds: float) -> str:
    return f"{seconds / MILLI:.3f}"


def _tera(flops_per_s: float) -> str:
    tera = flops_per_s / TERA
    return f"{tera:.1f}" if tera >= 1 else f"{tera:.3g}"
