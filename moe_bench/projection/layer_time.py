"""Seconds of one layer and micro batch, by part and pass, with what overlaps and what the host costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_bench.projection.constants import Constants
from moe_bench.projection.efficiency import Scale
from moe_bench.projection.evidence.rates import GEMM_HBM_FRACTION
from moe_bench.projection.pricing import PARTS, PASSES, SCALES, Floats, LayerTable, Link
from moe_bench.projection.work.operations import Pass

_FORWARD = PASSES.index(Pass.FORWARD)
_NUM_PARTS, _NUM_PASSES = len(PARTS), len(PASSES)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """Columns over layers; every second of a layer is in exactly one of them."""

    parts_s: Floats
    """[layer, pass, part]: kernels of the layer."""
    tensor_s: Floats
    """[layer, direction]: exposed tensor-parallel traffic, forward and backward."""
    context_s: Floats
    """[layer, direction]: context-parallel traffic that attention does not hide: the rest of a ring, and
    gathers and all-to-alls, which it waits for."""
    expert_s: Floats
    """[layer, direction]: exposed dispatch and combine, and what hiding them costs other kernels."""
    host_s: Floats
    """[layer, direction]: GPU waiting for kernels to be launched."""
    expert_traffic_s: Floats
    """[layer, direction]: dispatch and combine whether exposed or not; not a part of the sum."""

    @property
    def total_s(self) -> Floats:
        """[layer, direction]: a micro batch's time in the layer."""
        kernels = np.stack(
            [self.parts_s[:, _FORWARD].sum(-1), self.parts_s[:, _FORWARD + 1 :].sum((-1, -2))], axis=1
        )
        total: Floats = kernels + self.tensor_s + self.context_s + self.expert_s + self.host_s
        return total


def layer_times(table: LayerTable, constants: Constants) -> LayerTimes:
    """Times of all layers of `table`."""
    parts_s = _parts(table, constants)
    traffic_s = _traffic(table, constants)
    forward = parts_s[:, _FORWARD].sum(-1)
    backward = parts_s[:, _FORWARD + 1 :].sum((-1, -2))
    kernels_s = np.stack([forward, backward], axis=1)
    attention_s = _by_direction(parts_s[:, :, _ATTENTION])
    context_s = _exposed_ring(attention_s, traffic_s[:, :, Link.CONTEXT])
    context_s = context_s + traffic_s[:, :, Link.CONTEXT_GATHER]
    tensor_s = traffic_s[:, :, Link.TENSOR]
    busy_s = kernels_s + context_s + tensor_s
    expert_s = _exposed_dispatch(busy_s, traffic_s[:, :, Link.EXPERT], table, constants)
    return LayerTimes(
        parts_s=parts_s,
        tensor_s=tensor_s,
        context_s=context_s,
        expert_s=expert_s,
        host_s=_host(busy_s + expert_s, table, constants),
        expert_traffic_s=traffic_s[:, :, Link.EXPERT],
    )


_ATTENTION = next(index for index, part in enumerate(PARTS) if part == "attention")


def _parts(table: LayerTable, constants: Constants) -> Floats:
    """[layer, pass, part]: hypot(compute / sustained, memory / share) + start, added up."""
    kinds = {scale: table.scale == index for index, scale in enumerate(SCALES)}
    sustained = np.where(
        kinds[Scale.ATTENTION], constants.sustained_attention_fraction, constants.sustained_fraction
    )
    sustained = np.where(kinds[Scale.FP4_GEMM], sustained * constants.fp4_gain_factor, sustained)
    share = np.where(kinds[Scale.MEMORY], constants.memory_fraction, GEMM_HBM_FRACTION)
    share = np.where(kinds[Scale.QUANTIZATION], 1.0, share)
    start = np.where(table.is_graphed, _GRAPHED_START, 1.0)[table.owner]
    seconds = np.hypot(table.compute_s / sustained, table.memory_s / share) + start * table.overhead_s
    index = (table.owner * _NUM_PASSES + table.in_pass) * _NUM_PARTS + table.part
    summed = np.bincount(index, seconds, minlength=table.num_layers * _NUM_PASSES * _NUM_PARTS)
    return summed.reshape(table.num_layers, _NUM_PASSES, _NUM_PARTS)


_GRAPHED_START = 0.33
"""Of a kernel's start, what is left between two nodes of a CUDA graph: about 1 us."""


def _traffic(table: LayerTable, constants: Constants) -> Floats:
    """[layer, direction, link]: both links of a message work at once, messages follow each other."""
    nvlink_fraction = np.where(table.is_flex, constants.flex_nvlink_fraction, constants.nvlink_fraction)
    nic_fraction = np.where(table.is_flex, constants.nic_fraction, constants.alltoall_nic_fraction)
    seconds = np.maximum(table.nvlink_s / nvlink_fraction, table.nic_s / nic_fraction) + table.latency_s
    seconds = np.where(table.is_overlapped, seconds * constants.tensor_exposed_fraction, seconds)
    is_backward = table.message_pass != _FORWARD
    num_links = len(Link)
    index = (table.message_owner * 2 + is_backward) * num_links + table.link
    summed = np.bincount(index, seconds, minlength=table.num_layers * 2 * num_links)
    return summed.reshape(table.num_layers, 2, num_links)


def _by_direction(seconds: Floats) -> Floats:
    """[layer, pass] as [layer, direction]."""
    return np.stack([seconds[:, _FORWARD], seconds[:, _FORWARD + 1 :].sum(1)], axis=1)


def _exposed_ring(attention_s: Floats, ring_s: Floats) -> Floats:
    """What a ring of keys and values adds to the attention that it runs beside, its first hop included."""
    exposed: Floats = np.maximum(ring_s - attention_s, 0) + _RING_LEAK * ring_s
    return exposed


_RING_LEAK = 0.15
"""The first message of a ring has nothing to hide under, and the kernels of attention become smaller."""


def _exposed_dispatch(busy_s: Floats, dispatch_s: Floats, table: LayerTable, constants: Constants) -> Floats:
    """Dispatch and combine in full, or what overlap leaves of them.

    While A seconds of traffic run beside C seconds of kernels, these lose the share of the SMs and of the
    memory that it takes: max(C + loss A, A) - C over both directions of two micro batches, shared out by C.
    """
    busy, dispatch = busy_s.sum(1), dispatch_s.sum(1)
    joint = np.maximum(busy + constants.overlap_loss * dispatch, dispatch) - busy
    share = busy_s / busy[:, None]
    exposed: Floats = np.where(table.overlaps_experts[:, None], joint[:, None] * share, dispatch_s)
    return exposed


def _host(busy_s: Floats, table: LayerTable, constants: Constants) -> Floats:
    """What launching adds to the GPU's time: (g^p + h^p)^(1/p) - g over both directions, shared out by g."""
    launch_s = constants.launch_s * np.where(table.is_grace, constants.grace_launch_factor, 1.0)
    host = table.num_launches * launch_s
    busy = busy_s.sum(1)
    power = constants.host_exponent
    added = (busy**power + host**power) ** (1 / power) - busy
    waiting: Floats = added[:, None] * busy_s / busy[:, None]
    return waiting
