"""The machine a recipe is written for: datasheet facts of its GPU, node and fabric, with sources."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from moe_bench.spec.base import Key, PositiveFloat, PositiveInt, Spec, Text

AtLeastOne = Annotated[float, Field(ge=1)]


class GpuSpec(Spec):
    """One GPU, in datasheet figures: dense (not sparse) rates, no boost assumed beyond the datasheet."""

    device_name: Text
    """What `torch.cuda.get_device_name()` prints."""
    architecture: Literal["hopper", "blackwell"]
    compute_capability: Text
    num_sms: PositiveInt
    bf16_flops_per_s: PositiveFloat
    fp8_flops_per_s: PositiveFloat
    fp4_flops_per_s: PositiveFloat | None
    """Null where the GPU has no FP4 units."""
    hbm_bytes: PositiveInt
    """Capacity as sold."""
    usable_bytes: PositiveInt
    """What the driver reports as total memory; a process can never hold more."""
    hbm_bytes_per_s: PositiveFloat
    nvlink_bytes_per_s: PositiveFloat
    """Per GPU and direction."""
    max_power_w: PositiveFloat


class FabricSpec(Spec):
    """The switches that join NVLink domains, in tiers: leaf, spine, and core above both."""

    leaf_domains: PositiveInt
    """NVLink domains whose network cards meet in the same leaf switches, rail by rail."""
    spine_domains: PositiveInt
    """NVLink domains that reach each other without a core switch."""
    leaf_oversubscription_ratio: AtLeastOne = 1.0
    """Bandwidth below the leaf switches over that of their links upwards."""
    spine_oversubscription_ratio: AtLeastOne = 1.0
    """The same of the spine switches, relative to what reaches them."""


class SystemSpec(Spec):
    """A kind of cluster node and what joins it to the others."""

    key: Key
    """Name of its file under `recipes/systems/`."""
    display_name: Text
    gpu: GpuSpec | None
    """Null on a machine without GPUs: it has no peak, so nothing measured on it has an MFU."""
    gpus_per_node: PositiveInt
    """GPUs that share a host; processes that share it where there is no GPU."""
    host: Literal["x86", "grace"] = "x86"
    """Kind of its CPUs: Grace reaches its GPUs over NVLink-C2C, x86 over PCIe."""
    nvlink_domain_gpus: PositiveInt
    """GPUs that reach each other over NVLink; 72 in a GB200 NVL72 rack, 1 without NVLink."""
    nic_bytes_per_s: PositiveFloat | None
    """Per GPU and direction to other NVLink domains; null on one machine."""
    fabric: FabricSpec | None = None
    """Null where the tiers are not known, or where there is one machine."""
    sources: tuple[Text, ...]
