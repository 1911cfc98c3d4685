"""Reading what nvidia-smi prints; the lines are of its documented format, for GPUs that know more or less."""

from __future__ import annotations

import shutil

import pytest

from moe_bench.harness.device_facts import facts_from_answer, topology


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
