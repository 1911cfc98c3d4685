"""What is to be reached on one H100, and what the records of one say of it: each a ratio within one run.

The targets are the project's own; the rates of SonicMoE's figure 14 are those of arXiv:2512.14080. Toys, and
records of other GPUs or of none, say nothing here.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from moe_bench.analysis.layer_bytes import permute_bytes, router_bytes, unpermute_bytes
from moe_bench.results.layer_peers import LayerPeers
from moe_bench.results.layer_record import LayerRecord
from moe_bench.results.record import Record
from moe_bench.results.slice_metrics import slice_metrics
from moe_bench.results.sonicmoe import SHAPES, SonicShape

GPU = "NVIDIA H100 80GB HBM3"
EXPERT_GEMM_FRACTION = 0.75
FLOOR_RATIO = 1.5
MEMORY_FRACTION = 0.03
SPREAD_FRACTION = 0.01
SLICE_FLOPS_PER_S = {
    "deepseek_v3": 400e12,
    "qwen3_235b_a22b": 400e12,
    "qwen3_30b_a3b": 330e12,
    "gpt_oss_120b": 330e12,
}
ROUTING_FRACTION = {"deepseek_v3": 0.08, "qwen3_30b_a3b": 0.15}
PEER_RATIOS = (
    ("transformer_engine", 1.0, 0),
    ("grouped_mm", 1.2, 0),
    ("sequential", 3.0, 32),
    ("textbook", 10.0, 64),
)
"""Part of an engine's name, by how much it is to be slower, and from how many experts of a layer on."""
_ROUTING_PARTS = ("router", "permute", "unpermute")
_PRODUCTS = ("fc1", "fc2")


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """One figure that is to be reached."""

    what: str
    target: float
    is_at_least: bool
    """Whether the figure should be the target at least, or at most."""
    unit: Literal["fraction", "ratio", "flops_per_s"]
    measured: float | None = None
    """Of the best engine, in the newest records; None where there is no record."""
    by: str | None = None
    """Engine, or kernels, that reached it."""

    @property
    def is_reached(self) -> bool | None:
        """None without a measurement."""
        if self.measured is None:
            return None
        return self.measured >= self.target if self.is_at_least else self.measured <= self.target


def expert_gemms(model: str) -> str:
    """Name of the figure of a model's products."""
    return f"{model}: expert GEMMs over a dense product"


def routing(model: str) -> str:
    """Name of the figure of a model's router and permutations."""
    return f"{model}: router and permutations"


def suite_layer(shape: SonicShape) -> str:
    """Name of the figure of a layer of the suite."""
    return f"{shape.name}: over the highest published rate"


def slice_rate(model: str) -> str:
    """Name of the figure of a rank's rate."""
    return f"{model}: model FLOPs of a rank's compute"


def reached(layers: Iterable[LayerRecord], runs: Iterable[Record]) -> tuple[Reach, ...]:
    """Every figure with what the records say of it; of several records of one engine the last counts."""
    newest: dict[str, dict[str, LayerRecord]] = defaultdict(dict)
    for record in layers:
        if not record.is_tiny and record.provenance.gpu.name == GPU:
            newest[record.case.name][record.engine] = record
    slices = [
        record
        for record in runs
        if record.plan.scale == "slice" and [gpu.name for gpu in record.provenance.gpus] == [GPU]
    ]
    return (
        *_of_layers(newest),
        *_of_suite(newest),
        *_of_slices(slices),
    )


def _best(found: Sequence[tuple[float, str]], *, is_at_least: bool) -> tuple[float | None, str | None]:
    if not found:
        return None, None
    return max(found) if is_at_least else min(found)


def _of_model(newest: dict[str, dict[str, LayerRecord]], model: str) -> list[LayerRecord]:
    return [
        record
        for name, engines in newest.items()
        if name.startswith(f"{model}/")
        for record in engines.values()
    ]


def _of_layers(newest: dict[str, dict[str, LayerRecord]]) -> Iterator[Reach]:
    for model in SLICE_FLOPS_PER_S:
        records = _of_model(newest, model)
        rates = [
            (fraction, one.engine) for one in records if (fraction := expert_gemm_fraction(one)) is not None
        ]
        yield _reach(expert_gemms(model), EXPERT_GEMM_FRACTION, rates, "fraction")
        for part, target, fewest in PEER_RATIOS:
            found = [ratio for one in records if one.peers for ratio in _peer_ratios(one.peers, part, fewest)]
            # of several engines of a kind the fastest is to be beaten
            yield _reach(f"{model}: time of {part} over ours", target, sorted(found)[:1], "ratio")
        if model in ROUTING_FRACTION:
            shares = [(routing_fraction(one), one.engine) for one in records]
            yield _reach(routing(model), ROUTING_FRACTION[model], shares, "fraction", least=False)
            floors = [
                (ratio, one.engine) for one in records if (ratio := routing_floor_ratio(one)) is not None
            ]
            yield _reach(
                f"{model}: router and permutations over their bytes",
                FLOOR_RATIO,
                floors,
                "ratio",
                least=False,
            )


def _reach(
    what: str,
    target: float,
    found: Sequence[tuple[float, str]],
    unit: Literal["fraction", "ratio", "flops_per_s"],
    *,
    least: bool = True,
) -> Reach:
    measured, by = _best(found, is_at_least=least)
    return Reach(what=what, target=target, is_at_least=least, unit=unit, measured=measured, by=by)


def expert_gemm_fraction(record: LayerRecord) -> float | None:
    """Rate of the routed experts' products, all three passes, over that of one large dense product.

    None where the run has no such product, or the engine's products cannot be told apart.
    """
    products_s = sum(part.median_s for part in record.parts if part.part in _PRODUCTS)
    if record.dense_flops_per_s is None or products_s == 0:
        return None
    return (record.forward_flops + record.backward_flops) / products_s / record.dense_flops_per_s


def routing_fraction(record: LayerRecord) -> float:
    """Share of router, permute and unpermute, both passes, in the whole layer."""
    return _routing_s(record) / record.whole.median_s


def routing_floor_ratio(record: LayerRecord) -> float | None:
    """The same time over that of the bytes they must move at the copy's speed; None without that speed."""
    if record.copy_bytes_per_s is None:
        return None
    received = sum(record.local_tokens_per_expert)
    moved = (
        router_bytes(record.case)
        + permute_bytes(record.case, num_received_rows=received)
        + unpermute_bytes(record.case, num_received_rows=received)
    )
    return _routing_s(record) / (moved / record.copy_bytes_per_s)


def _routing_s(record: LayerRecord) -> float:
    return sum(part.median_s for part in record.parts if part.part in _ROUTING_PARTS)


def _peer_ratios(peers: LayerPeers, part: str, fewest: int) -> Iterator[tuple[float, str]]:
    if peers.case.moe.num_experts < fewest:
        return
    for engine in peers.engines:
        ratio = peers.ratio(engine.engine, "forward and backward") if part in engine.engine else None
        if ratio is not None:
            yield ratio.median_ratio, engine.engine


def _of_suite(newest: dict[str, dict[str, LayerRecord]]) -> Iterator[Reach]:
    for shape in SHAPES:
        rates = (shape.sonicmoe, shape.megatron)
        forward = max(rate.forward_flops_per_s for rate in rates)
        backward = max(rate.backward_flops_per_s for rate in rates)
        found = [
            (min(one.forward_flops_per_s / forward, one.backward_flops_per_s / backward), one.engine)
            for one in newest.get(shape.name, {}).values()
        ]
        yield _reach(suite_layer(shape), 1.0, found, "ratio")


def _of_slices(slices: Sequence[Record]) -> Iterator[Reach]:
    for model, target in SLICE_FLOPS_PER_S.items():
        own = [record for record in slices if record.plan.asked.startswith(f"{model}/")]
        measured = [(one, record) for record in own if (one := slice_metrics(record)) is not None]
        rates = [(one.flops_per_s, record.plan.recipe.kernels.family) for one, record in measured]
        yield _reach(slice_rate(model), target, rates, "flops_per_s")
        misses = [
            (abs(one.peak_memory_bytes / one.closed_form_peak_bytes - 1), record.plan.recipe.kernels.family)
            for one, record in measured
        ]
        # every slice is to be right, so the worst stands here
        worst = [max(misses)] if misses else []
        yield _reach(
            f"{model}: peak memory off the closed form", MEMORY_FRACTION, worst, "fraction", least=False
        )
        spreads = list(_spreads(measured_by_kernels(own)))
        yield _reach(f"{model}: spread of repeats", SPREAD_FRACTION, spreads, "fraction", least=False)


def measured_by_kernels(records: Iterable[Record]) -> dict[tuple[str, str], list[float]]:
    """Seconds of a micro batch in the repeats of each recipe and family of kernels."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        one = slice_metrics(record)
        if one is not None:
            found[record.plan.asked, record.plan.recipe.kernels.family].append(one.micro_batch_s)
    return found


def _spreads(repeats: dict[tuple[str, str], list[float]]) -> Iterator[tuple[float, str]]:
    """(largest - smallest) / median of those with three repeats at least."""
    for (_, family), seconds in repeats.items():
        if len(seconds) >= 3:
            yield (max(seconds) - min(seconds)) / statistics.median(seconds), family
