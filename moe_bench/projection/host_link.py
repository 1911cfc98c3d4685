"""Activations of whole layers that leave for host memory and come back: their bytes and the link's rates."""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.projection.work.traits import Traits
from moe_bench.spec.recipe import Offload, Recipe
from moe_bench.spec.system import SystemSpec

_GRACE_TO_HOST, _GRACE_FROM_HOST = 182e9, 170e9
"""Bytes per second of each GPU of a GB300 tray while all four copy (nvbandwidth, all_to_host and host_to_all:
NVIDIA/Megatron-LM issue 6491). A GB200 has the same CPUs and links."""
_PCIE = 55e9
"""The same over PCIe 5 with 16 lanes, of 63 (nvbandwidth, host_to_device_memcpy_ce on x86 hosts)."""
_GRACE_TO_GRACE = 110e9
"""Between the two CPUs of a GB300 tray: STREAM from one of them over the memory of the other
(ForceInjection/AI-fundamentals issue 22). Two GPUs share it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTraffic:
    """Copies of one micro batch on the rank that holds the layers."""

    to_host_s: float
    """In the forward pass."""
    from_host_s: float
    """In the backward pass."""


def host_traffic(recipe: Recipe, traits: Traits) -> HostTraffic:
    """What `offload.num_activation_layers` copies of every micro batch; nothing where it is 0."""
    if not recipe.offload.num_activation_layers:
        return HostTraffic(to_host_s=0.0, from_host_s=0.0)
    num_bytes = offloaded_bytes(recipe)
    to_host, from_host = _bytes_per_s(recipe.system, traits)
    return HostTraffic(to_host_s=num_bytes / to_host, from_host_s=num_bytes / from_host)


def offloaded_bytes(recipe: Recipe) -> int:
    """Activations of one micro batch in host memory: what the layers keep, less what they keep on the GPU.

    Only recipes without a pipeline offload whole layers (rule `offloaded_layers`).
    """
    resident = recipe.model_copy(update={"offload": Offload()})
    kept, without = (
        sum(ModelMemory(one).chunk(chunk).kept_bytes for chunk in one.chunks()) for one in (recipe, resident)
    )
    return without - kept


def _bytes_per_s(system: SystemSpec, traits: Traits) -> tuple[float, float]:
    """Of the slowest GPU, to the host and back."""
    if system.host != "grace":
        return _PCIE, _PCIE
    if traits.is_bound_to_first_cpu:
        far = _GRACE_TO_GRACE / 2
        return min(_GRACE_TO_HOST, far), min(_GRACE_FROM_HOST, far)
    return _GRACE_TO_HOST, _GRACE_FROM_HOST
