"""Layers with the price of every operation at reference rates, as columns that one pass of arrays adds up.

The constants of the projection enter last, so a fit evaluates hundreds of published rows in milliseconds with
the very code that projects one recipe.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from moe_bench.analysis.collectives import Collective, Group
from moe_bench.projection.efficiency import Cost, Efficiency, Scale
from moe_bench.projection.evidence.grade import Grade
from moe_bench.projection.evidence.rates import KERNEL_START_S
from moe_bench.projection.fabric import Fabric, LinkTime
from moe_bench.projection.work.operations import (
    AttentionCore,
    Gemm,
    LayerWork,
    Message,
    Operation,
    Part,
    Pass,
    SparseCore,
    StateUpdate,
)
from moe_bench.projection.work.traits import MEGATRON, Traits

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_SCAN_FLOPS_PER_S = {"hopper": 80e12, "blackwell": 40e12}
_DELTA_RULE_FLOPS_PER_S = {"hopper": 12e12, "blackwell": 12e12}
"""Of the scans of Mamba-2 and gated delta nets: small products of 64 to 256 channels in Triton, between
dependent chunks. Set by hand from rows of Nemotron 3, and of Qwen3-Next and its successors; not measured."""

PARTS = tuple(Part)
PASSES = tuple(Pass)
SCALES = tuple(Scale)


class Link(IntEnum):
    """Kinds of traffic that overlap differently."""

    EXPERT = 0
    TENSOR = 1
    CONTEXT = 2
    """A ring of keys and values, each message beside the attention to the one before."""
    CONTEXT_GATHER = 3
    """Gathers and all-to-alls of context ranks: attention begins when they are over."""


_LINK_OF = {
    Group.EXPERT: Link.EXPERT,
    Group.EXPERT_TENSOR: Link.EXPERT,
    Group.EXPERT_TENSOR_EXPERT: Link.EXPERT,
    Group.CONTEXT: Link.CONTEXT,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class PricedLayer:
    """One kind of layer of one recipe; columns over its operations, then over its messages."""

    part: Ints
    in_pass: Ints
    scale: Ints
    compute_s: Floats
    memory_s: Floats
    overhead_s: Floats
    link: Ints
    message_pass: Ints
    is_flex: npt.NDArray[np.bool_]
    is_overlapped: npt.NDArray[np.bool_]
    nvlink_s: Floats
    nic_s: Floats
    latency_s: Floats
    num_launches: float
    grades: Mapping[Part, Grade]
    """The worst evidence of each part's operations."""


@dataclass(frozen=True, slots=True)
class Pricer:
    """Prices the layers of one recipe."""

    efficiency: Efficiency
    fabric: Fabric
    traits: Traits = MEGATRON

    def price(self, work: LayerWork) -> PricedLayer:
        """Every operation and message of a layer at reference rates."""
        costs = [self._cost(operation) for operation in work.operations]
        times = self._times(work.messages)
        return PricedLayer(
            part=_ints(PARTS.index(_part(operation)) for operation in work.operations),
            in_pass=_ints(PASSES.index(operation.in_pass) for operation in work.operations),
            scale=_ints(SCALES.index(cost.scale) for cost in costs),
            compute_s=_floats(cost.compute_s for cost in costs),
            memory_s=_floats(cost.memory_s for cost in costs),
            overhead_s=_floats(cost.overhead_s for cost in costs),
            link=_ints(_link(message) for message, _ in times),
            message_pass=_ints(PASSES.index(message.in_pass) for message, _ in times),
            is_flex=np.array([time.is_flex for _, time in times], dtype=bool),
            is_overlapped=np.array([message.is_overlapped for message, _ in times], dtype=bool),
            nvlink_s=_floats(time.nvlink_s for _, time in times),
            nic_s=_floats(time.nic_s for _, time in times),
            latency_s=_floats(time.latency_s for _, time in times),
            num_launches=work.num_launches,
            grades=_grades(work.operations, costs),
        )

    def _times(self, messages: Sequence[Message]) -> list[tuple[Message, LinkTime]]:
        """Messages that take time; the hops of one dispatch or combine as one, since both links
        work at once.
        """
        merged: dict[tuple[Pass, str, int], tuple[Message, LinkTime]] = {}
        for index, message in enumerate(messages):
            time = self.fabric.time(message.op, message.group, message.num_bytes)
            key = (message.in_pass, message.what, -1 if time.is_flex else index)
            if key in merged:
                merged[key] = (message, merged[key][1].beside(time))
            elif time.nvlink_s or time.nic_s:
                merged[key] = (message, time)
        return list(merged.values())

    def _cost(self, operation: Operation) -> Cost:
        if isinstance(operation, Gemm):
            cost = self.efficiency.gemm(operation)
            ratio = self.efficiency.sustained_ratio
            if operation.part is Part.EXPERTS:
                ratio *= self.traits.experts_fraction
            return replace(cost, compute_s=cost.compute_s / ratio)
        if isinstance(operation, AttentionCore):
            cost = self.efficiency.attention(operation)
            return replace(cost, compute_s=cost.compute_s / self.traits.attention_fraction)
        if isinstance(operation, SparseCore):
            return self.efficiency.sparse_attention(operation)
        if isinstance(operation, StateUpdate):
            rates = _DELTA_RULE_FLOPS_PER_S if operation.is_delta_rule else _SCAN_FLOPS_PER_S
            gpu = self.fabric.system.gpu
            return Cost(
                compute_s=operation.num_flops / rates["hopper" if gpu is None else gpu.architecture],
                memory_s=0.0,
                overhead_s=KERNEL_START_S,
                scale=Scale.GEMM,
                grade=Grade.PRIOR,
                source="set by hand",
            )
        return self.efficiency.memory(operation)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTable:
    """Many priced layers end to end, each operation with the index of its layer."""

    num_layers: int
    owner: Ints
    part: Ints
    in_pass: Ints
    scale: Ints
    compute_s: Floats
    memory_s: Floats
    overhead_s: Floats
    message_owner: Ints
    link: Ints
    message_pass: Ints
    is_flex: npt.NDArray[np.bool_]
    is_overlapped: npt.NDArray[np.bool_]
    nvlink_s: Floats
    nic_s: Floats
    latency_s: Floats
    num_launches: Floats
    is_grace: npt.NDArray[np.bool_]
    overlaps_experts: npt.NDArray[np.bool_]
    """Whether dispatch and combine run beside another micro batch's computation."""
    is_graphed: npt.NDArray[np.bool_]
    """Whether one CUDA graph holds the whole step."""

    def slowed(self, factor: float) -> LayerTable:
        """The same with kernels and launches that take `factor` times as long; messages stay."""
        return replace(
            self,
            compute_s=self.compute_s * factor,
            memory_s=self.memory_s * factor,
            overhead_s=self.overhead_s * factor,
            num_launches=self.num_launches * factor,
        )


@dataclass(frozen=True, slots=True)
class LayerSetting:
    """What the machine and the recipe decide about a layer's time beyond its operations."""

    is_grace: bool
    overlaps_experts: bool
    is_graphed: bool


def stack(layers: Sequence[tuple[PricedLayer, LayerSetting]]) -> LayerTable:
    """One table of all `layers`, owner i being the i-th."""
    priced = [layer for layer, _ in layers]
    settings = [setting for _, setting in layers]
    sizes = [len(layer.part) for layer in priced]
    message_sizes = [len(layer.link) for layer in priced]
    indices = np.arange(len(layers))
    return LayerTable(
        num_layers=len(layers),
        owner=np.repeat(indices, sizes),
        part=_join(layer.part for layer in priced),
        in_pass=_join(layer.in_pass for layer in priced),
        scale=_join(layer.scale for layer in priced),
        compute_s=_join(layer.compute_s for layer in priced),
        memory_s=_join(layer.memory_s for layer in priced),
        overhead_s=_join(layer.overhead_s for layer in priced),
        message_owner=np.repeat(indices, message_sizes),
        link=_join(layer.link for layer in priced),
        message_pass=_join(layer.message_pass for layer in priced),
        is_flex=_join(layer.is_flex for layer in priced),
        is_overlapped=_join(layer.is_overlapped for layer in priced),
        nvlink_s=_join(layer.nvlink_s for layer in priced),
        nic_s=_join(layer.nic_s for layer in priced),
        latency_s=_join(layer.latency_s for layer in priced),
        num_launches=_floats(layer.num_launches for layer in priced),
        is_grace=np.array([setting.is_grace for setting in settings], dtype=bool),
        overlaps_experts=np.array([setting.overlaps_experts for setting in settings], dtype=bool),
        is_graphed=np.array([setting.is_graphed for setting in settings], dtype=bool),
    )


def _join[Kind: np.generic](columns: Iterable[npt.NDArray[Kind]]) -> npt.NDArray[Kind]:
    return np.concatenate(list(columns))


def _grades(operations: Iterable[Operation], costs: Iterable[Cost]) -> dict[Part, Grade]:
    """Constants of the projection scale every rate, so nothing that was not measured here is better than
    fitted; the share of the memory's bandwidth is such a constant itself.
    """
    grades: dict[Part, Grade] = {}
    for operation, cost in zip(operations, costs, strict=True):
        grade = Grade.FITTED if cost.scale is Scale.MEMORY else cost.grade
        least = Grade.MEASURED_HERE if cost.grade is Grade.MEASURED_HERE else Grade.FITTED
        part = _part(operation)
        grades[part] = max(grades.get(part, Grade.MEASURED_HERE), grade, least)
    return grades


def _link(message: Message) -> Link:
    link = _LINK_OF.get(message.group, Link.TENSOR)
    return Link.CONTEXT_GATHER if link is Link.CONTEXT and message.op is not Collective.SEND else link


def _part(operation: Operation) -> Part:
    if isinstance(operation, StateUpdate):
        return Part.STATE_MIXER
    return Part.ATTENTION if isinstance(operation, AttentionCore | SparseCore) else operation.part


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, dtype=np.int64)


def _floats(values: Iterable[float]) -> Floats:
    return np.fromiter(values, dtype=np.float64)
