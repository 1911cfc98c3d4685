"""A calibration on its way to disk: what a kill leaves, what goes on, and what may not be mixed."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.errors import BadInputError
from moe_bench.results.calibration import (
    CPU,
    CalibrationProvenance,
    Launch,
    Measurement,
    Task,
    Unmeasured,
    read_calibration,
)
from moe_bench.results.calibration_journal import (
    Journal,
    resume_journal,
    start_journal,
    unfinished_journals,
)
from moe_bench.results.record import GitState, GpuFacts

HERE = CalibrationProvenance(
    started_at="2026-11-22T07:00:00+00:00",
    command=("moe-bench", "calibrate"),
    job_id="pid1",
    git=GitState(commit="0123456789abcdef", branch="main", is_dirty=False),
    python_version="3.12.1",
    packages={"torch": "2.15.0"},
    host="node0",
    gpu=GpuFacts(name="NVIDIA H100 80GB HBM3"),
    cuda_version="13.0",
    environment={},
)


def task(num_kernels: int) -> Task:
    return Task(
        what=Launch(operation="launch", num_kernels=num_kernels), dtype="fp32", implementation="made up"
    )


def measured(num_kernels: int) -> Measurement:
    return Measurement(**dict(task(num_kernels)), cold_l2=False, samples_s=(0.1 * num_kernels,))


def missed(num_kernels: int) -> Unmeasured:
    return Unmeasured(**dict(task(num_kernels)), reason="made up, too")


def begun(root: Path) -> Journal:
    journal = start_journal(root, HERE, is_tiny=False)
    journal.append(measured(1))
    journal.append(missed(2))
    return journal


def test_a_finished_journal_is_a_calibration_file_named_by_start_commit_and_job(tmp_path: Path) -> None:
    path = begun(tmp_path).finish(end_sm_clock_hz=1.5e9)
    assert path == tmp_path / "calibration/nvidia_h100_80gb_hbm3/20261122T070000Z-01234567-pid1.json"
    found = read_calibration(path)
    assert found.measurements == (measured(1),)
    assert found.unmeasured == (missed(2),)
    assert found.provenance.end_sm_clock_hz == 1.5e9
    assert found.is_evidence
    assert unfinished_journals(tmp_path, HERE.gpu.name) == ()


def test_a_journal_goes_on_after_what_a_kill_cut_off(tmp_path: Path) -> None:
    begun(tmp_path)
    (path,) = unfinished_journals(tmp_path, HERE.gpu.name)
    with path.open("ab") as file:
        file.write(measured(3).model_dump_json().encode()[:40])
    journal = resume_journal(path, HERE, is_tiny=False)
    assert journal.done == {task(1), task(2)}
    journal.append(measured(3))
    assert resume_journal(path, HERE, is_tiny=False).entries == [measured(1), missed(2), measured(3)]
    assert len(read_calibration(journal.finish(end_sm_clock_hz=None)).measurements) == 2


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"packages": {"torch": "2.14.0"}}, "packages"),
        ({"gpu": GpuFacts(name=HERE.gpu.name, driver_version="580")}, "driver"),
        ({"git": GitState(commit="fedcba9876543210", branch="main", is_dirty=False)}, "commit"),
    ],
)
def test_a_file_holds_one_state_of_the_software(tmp_path: Path, change: dict[str, object], name: str) -> None:
    path = begun(tmp_path).path
    with pytest.raises(BadInputError, match=f"{name}: .* when it was begun, .* now"):
        resume_journal(path, HERE.model_copy(update=change), is_tiny=False)


def test_toy_shapes_and_real_ones_do_not_share_a_file(tmp_path: Path) -> None:
    path = begun(tmp_path).path
    with pytest.raises(BadInputError, match="--tiny: False when it was begun, True now"):
        resume_journal(path, HERE, is_tiny=True)


@pytest.mark.parametrize("text", ["", "{}\n", '{"torn": '])
def test_what_is_no_journal_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / ".one.unfinished"
    path.write_text(text)
    with pytest.raises(BadInputError, match="not a journal of calibrate"):
        resume_journal(path, HERE, is_tiny=False)


def test_a_journal_without_a_measurement_becomes_no_file(tmp_path: Path) -> None:
    journal = start_journal(tmp_path, HERE, is_tiny=False)
    journal.append(missed(1))
    with pytest.raises(BadInputError, match="no measurement"):
        journal.finish(end_sm_clock_hz=None)


def test_a_file_of_a_cpu_or_of_toy_shapes_is_no_evidence(tmp_path: Path) -> None:
    tiny = start_journal(tmp_path, HERE, is_tiny=True)
    tiny.append(measured(1))
    assert not read_calibration(tiny.finish(end_sm_clock_hz=None)).is_evidence
    cpu = start_journal(tmp_path, HERE.model_copy(update={"gpu": GpuFacts(name=CPU)}), is_tiny=False)
    cpu.append(measured(1))
    assert not read_calibration(cpu.finish(end_sm_clock_hz=None)).is_evidence
