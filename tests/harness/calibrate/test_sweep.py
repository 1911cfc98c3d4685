"""A list of tasks on its way to a file: what is skipped, what is named as missing, and when a budget ends."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.calibrate.sweep import Sweep, provenance_here, run_tasks, sweep_here
from moe_bench.harness.timing import HostClock
from moe_bench.results.calibration import CPU, DenseGemm, GroupedGemm, Measurement, Task, Unmeasured
from moe_bench.results.calibration_journal import Journal, start_journal
from moe_bench.results.calibration_tasks import Implementation
from moe_bench.spec.recipe import Recipe


def no_toy(num_layers: int) -> Recipe:
    raise AssertionError(f"{num_layers} layers: no launch is measured here")


SWEEP = Sweep(device="cpu", clock=HostClock(), launching_toy=no_toy, is_tiny=True)


def product(num_rows: int, implementation: Implementation = Implementation.MM) -> Task:
    what = DenseGemm(operation="dense_gemm", num_rows=num_rows, num_inner=16, num_columns=16)
    return Task(what=what, dtype="bf16", implementation=implementation)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    here = provenance_here(command=("test",), environment={"SLURM_JOB_ID": "7"}, source_root=tmp_path)
    assert here.job_id == "job7"
    return start_journal(tmp_path, here, is_tiny=True)


def test_what_the_journal_has_is_not_measured_again(journal: Journal) -> None:
    entry = SWEEP.measure(product(8))
    journal.append(entry)
    asked: list[Task] = []
    left = run_tasks(
        SWEEP,
        [product(8), product(16)],
        journal,
        budget_s=None,
        on_task=asked.append,
        on_entry=lambda entry: None,
    )
    assert (left, asked) == (0, [product(16)])
    assert journal.done == {product(8), product(16)}
    assert journal.entries[0] is entry


def test_a_budget_ends_the_run_between_two_measurements(journal: Journal) -> None:
    clock: Iterator[float] = iter([0.0, 1.0, 6.0, 11.0])
    left = run_tasks(
        SWEEP,
        [product(8), product(16), product(24), product(32)],
        journal,
        budget_s=10.0,
        on_task=lambda task: None,
        on_entry=lambda entry: None,
        now_s=lambda: next(clock),
    )
    assert left == 2
    assert journal.done == {product(8), product(16)}


def test_samples_stand_with_what_they_were_taken_with() -> None:
    entry = SWEEP.measure(product(8))
    assert isinstance(entry, Measurement)
    assert entry.implementation == "torch.mm"
    assert not entry.cold_l2
    assert entry.start_sm_clock_hz is None


def test_a_package_that_is_not_here_is_named_and_nothing_runs_in_its_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    entry = SWEEP.measure(product(8, Implementation.TE_LINEAR))
    assert isinstance(entry, Unmeasured)
    assert entry.reason == "transformer_engine is not installed"


def test_a_shape_that_torch_refuses_is_named_with_its_words() -> None:
    odd = GroupedGemm(
        operation="grouped_gemm",
        direction="forward",
        tokens_per_expert=(8, 8),
        num_inputs=3,
        num_outputs=8,
    )
    entry = SWEEP.measure(Task(what=odd, dtype="bf16", implementation=Implementation.GROUPED_MM))
    assert isinstance(entry, Unmeasured)
    assert entry.reason.startswith("RuntimeError: ")
    assert "\n" not in entry.reason


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_only_toy_shapes_are_measured() -> None:
    assert sweep_here(no_toy, is_tiny=True).device == CPU
    with pytest.raises(MissingRequirementError, match="--tiny"):
        sweep_here(no_toy, is_tiny=False)


@pytest.mark.gpu("a CPU has no CUDA events, clocks and L2 to read")
def test_on_a_gpu_the_l2_is_flushed_and_clocks_stand_beside_the_samples() -> None:
    entry = sweep_here(no_toy, is_tiny=True).measure(product(1024))
    assert isinstance(entry, Measurement)
    assert entry.cold_l2
    assert entry.start_sm_clock_hz is not None
    assert entry.end_sm_clock_hz is not None
