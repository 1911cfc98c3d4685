"""What a rank's GPU, driver and communication library say about themselves, as plain data."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pynvml
import torch

from moe_bench.results.record import GpuFacts

_QUERY = (
    "driver_version",
    "power.limit",
    "clocks.current.sm",
    "clocks.max.sm",
    "memory.total",
    "ecc.mode.current",
    "compute_mode",
)
_FORMAT = "--format=csv,noheader,nounits"
_HZ_PER_MHZ = 1e6
_J_PER_MJ = 1e-3
_BYTES_PER_MIB = 1024**2


def gpu_facts() -> GpuFacts:
    """Name of this rank's GPU, and what nvidia-smi knows about it where that program is installed."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    answer = _nvidia_smi(f"--id=GPU-{properties.uuid}", f"--query-gpu={','.join(_QUERY)}", _FORMAT)
    return GpuFacts(name=properties.name) if answer is None else facts_from_answer(properties.name, answer)


def facts_from_answer(name: str, answer: str) -> GpuFacts:
    """Facts from one line of nvidia-smi's CSV; those that a GPU does not know (`[N/A]`) are None."""
    fields = [field.strip() for field in answer.strip().split(",")]
    if len(fields) != len(_QUERY):
        return GpuFacts(name=name)
    driver, power, clock, max_clock, memory, ecc, compute_mode = (
        None if field.startswith("[") else field for field in fields
    )
    return GpuFacts(
        name=name,
        driver_version=driver,
        power_limit_w=_number(power),
        sm_clock_hz=_number(clock, _HZ_PER_MHZ),
        max_sm_clock_hz=_number(max_clock, _HZ_PER_MHZ),
        memory_bytes=None if (mib := _number(memory)) is None else int(mib * _BYTES_PER_MIB),
        ecc_enabled={"Enabled": True, "Disabled": False}.get(ecc or ""),
        compute_mode=compute_mode,
    )


def energy_counter_j() -> float | None:
    """Joules that this rank's GPU has used since its driver was loaded; None where it does not count them.

    NVML counts in millijoules, from Volta on (nvmlDeviceGetTotalEnergyConsumption).
    """
    used_mj = _asked_of_driver(pynvml.nvmlDeviceGetTotalEnergyConsumption)
    return None if used_mj is None else used_mj * _J_PER_MJ


def sm_clock_hz() -> float | None:
    """Clock of this rank's GPU at this moment; None where the driver does not say."""
    clock_mhz = _asked_of_driver(lambda gpu: pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM))
    return None if clock_mhz is None else clock_mhz * _HZ_PER_MHZ


def _asked_of_driver(question: Callable[[Any], int]) -> float | None:
    """NVML's answer about this rank's GPU; None where it gives none.

    Not every GPU knows every counter, and virtual machines and partitions of a GPU hide some.
    """
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    try:
        pynvml.nvmlInit()
        try:
            return float(question(pynvml.nvmlDeviceGetHandleByUUID(uuid)))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None


def nccl_version() -> str | None:
    """Version of NCCL that torch was linked with; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def cuda_version() -> str | None:
    """Version of CUDA that torch was built with; None for a CPU build."""
    return torch.version.cuda


def topology() -> str | None:
    """How this host's GPUs and network cards are connected: `nvidia-smi topo -m`."""
    answer = _nvidia_smi("topo", "-m")
    return None if answer is None else answer.strip()


def _nvidia_smi(*arguments: str) -> str | None:
    """What the program prints; None where it is not installed or fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    done = subprocess.run((program, *arguments), capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None


def _number(text: str | None, unit: float = 1.0) -> float | None:
    return None if text is None else float(text) * unit
