"""Reading what nvidia-smi prints; the lines are of its documented format, for GPUs that know more or less."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import pynvml
import pytest

from moe_bench.harness import device_facts
from moe_bench.harness.device_facts import energy_counter_j, facts_from_answer, topology


def test_units_become_si() -> None:
    facts = facts_from_answer(
        "NVIDIA H100 80GB HBM3", "550.54.15, 700.00, 1980, 1980, 81559, Enabled, Default\n"
    )
    assert facts.driver_version == "550.54.15"
    assert facts.power_limit_w == 700.0
    assert facts.sm_clock_hz == facts.max_sm_clock_hz == 1.98e9
    assert facts.memory_bytes == 81559 * 1024**2
    assert facts.ecc_enabled is True
    assert facts.compute_mode == "Default"


def test_what_a_gpu_does_not_know_is_absent_not_zero() -> None:
    facts = facts_from_answer("GeForce", "550.54.15, [N/A], 210, 2100, 8192, [N/A], Default")
    assert facts.power_limit_w is None
    assert facts.ecc_enabled is None
    assert facts.sm_clock_hz == 2.1e8


def test_ecc_that_is_off_is_not_unknown() -> None:
    assert facts_from_answer("L4", "550, 72.00, 300, 2040, 23034, Disabled, Default").ecc_enabled is False


def test_an_answer_of_another_shape_leaves_the_name_alone() -> None:
    facts = facts_from_answer("NVIDIA H100 80GB HBM3", "Unable to determine the device handle\n")
    assert facts.model_dump(exclude_none=True) == {"name": "NVIDIA H100 80GB HBM3"}


def test_without_nvidia_smi_there_is_no_topology(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert topology() is None


def fake_nvml(monkeypatch: pytest.MonkeyPatch, consumption: object) -> list[str]:
    """Stands in for the driver's library, which this machine need not have; returns the calls made."""
    calls: list[str] = []

    def count(handle: object) -> int:
        calls.append(f"count {handle}")
        if isinstance(consumption, Exception):
            raise consumption
        return int(str(consumption))

    properties = SimpleNamespace(uuid="0123")
    monkeypatch.setattr(device_facts.torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(device_facts.torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: calls.append("init"))
    monkeypatch.setattr(pynvml, "nvmlShutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: uuid)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetTotalEnergyConsumption", count)
    return calls


def test_energy_is_counted_in_joules_for_the_gpu_of_this_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = fake_nvml(monkeypatch, 1_234_567)
    assert energy_counter_j() == pytest.approx(1234.567)
    assert calls == ["init", "count GPU-0123", "shutdown"]


@pytest.mark.parametrize("error", [pynvml.NVMLError_NotSupported(), pynvml.NVMLError_NoPermission()])
def test_a_gpu_that_does_not_tell_its_energy_has_none(
    monkeypatch: pytest.MonkeyPatch, error: pynvml.NVMLError
) -> None:
    calls = fake_nvml(monkeypatch, error)
    assert energy_counter_j() is None
    assert calls[-1] == "shutdown"
