"""`moe-bench calibrate` as a user meets it: planned, run, killed half-way and gone on with, at toy shapes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moe_bench.cli import main
from moe_bench.cli.gpu import DEFAULT_SYSTEM
from moe_bench.projection.constants import Constants
from moe_bench.projection.evidence.calibrated_constants import constants_for
from moe_bench.projection.evidence.calibrated_shapes import read_calibrations
from moe_bench.results.calibration import CPU, Calibration, Task, read_calibration
from moe_bench.results.calibration_tasks import OPERATIONS
from moe_bench.results.journal import UNFINISHED
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader

pytestmark = pytest.mark.usefixtures("no_gpu")

COMMAND = (sys.executable, "-m", "moe_bench", "calibrate", "--tiny")
NUM_BEFORE_THE_KILL = 40
EXPECTED_REASONS = {
    "is not installed",
    "between host and device need a GPU",
    "attention has no backward pass on a CPU",
}


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested is the CPU path, also on a machine with a GPU; torch sees none either."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr("moe_bench.cli.gpu.gpu_here", lambda: None)


def planned(capsys: pytest.CaptureFixture[str], *options: str) -> list[Task]:
    assert main(["calibrate", "--plan", "--json", *options]) == 0
    lines = json.loads(capsys.readouterr().out)["tasks"]
    fields = ("what", "dtype", "implementation")
    return [Task.model_validate_json(json.dumps({key: line[key] for key in fields})) for line in lines]


def tasks_of(calibration: Calibration) -> set[Task]:
    entries = (*calibration.measurements, *calibration.unmeasured)
    return {Task(what=one.what, dtype=one.dtype, implementation=one.implementation) for one in entries}


def test_the_whole_list_is_killed_half_way_and_gone_on_with(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "calibration" / CPU
    process = subprocess.Popen([*COMMAND, "--out", str(tmp_path)], stderr=subprocess.DEVNULL)
    while process.poll() is None and _num_lines(folder) < NUM_BEFORE_THE_KILL:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (journal,) = folder.glob(f".*{UNFINISHED}")
    before = journal.read_bytes()
    resumed = subprocess.run(
        [*COMMAND, "--resume", "--json", "--out", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    path = Path(json.loads(resumed.stdout)["path"])
    assert [path] == list(folder.iterdir())
    calibration = read_calibration(path)
    assert tasks_of(calibration) == set(planned(capsys, "--tiny"))
    assert {one.what.operation for one in calibration.measurements} == set(OPERATIONS)
    assert {one.reason.split(" ", 1)[1] for one in calibration.unmeasured} == EXPECTED_REASONS
    for line in before.splitlines()[1:NUM_BEFORE_THE_KILL]:
        entry = json.loads(line)
        if "samples_s" in entry:
            assert tuple(entry["samples_s"]) in {one.samples_s for one in calibration.measurements}
    _is_no_evidence(calibration, tmp_path)


def _num_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob(f".*{UNFINISHED}"))


def _is_no_evidence(calibration: Calibration, root: Path) -> None:
    system = Loader(root=recipes_root(), rules=()).system(DEFAULT_SYSTEM)
    assert system.gpu is not None
    assert calibration.is_tiny
    assert calibration.provenance.gpu.name == CPU
    assert read_calibrations(system.gpu, root) == ()
    assert constants_for(system, [calibration]).constants == Constants()


def test_the_plan_prints_every_measurement_with_its_seconds_and_memory_and_the_total(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["calibrate", "deepseek_v3", "--plan", "--only", "grouped_gemm,sustained"]) == 0
    text = capsys.readouterr().out
    heading, first, *_ = text.splitlines()
    assert heading.split()[:5] == ["#", "operation", "shape", "dtype", "with"]
    assert first.split()[:2] == ["1", "sustained"]
    assert "estimated" in text
    assert "not installed: transformer_engine GroupedLinear" in text
    assert "router" not in text


def test_without_a_gpu_the_real_shapes_are_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--plan" in error
    assert "--tiny" in error


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--only", "sort"], "--only sort: sort: unknown operation; choose from dense_gemm,"),
        (["--only", ","], "--only ,: nothing: unknown operation"),
        (["no_such_model"], "no_such_model"),
        (["--tiny", "--system", "h200"], "--system estimates without a GPU; add --plan"),
        (["--plan", "--system", "cpu_host"], "gpu: null"),
        (["--plan", "--only", "sustained", "--budget-seconds", "1"], "nothing to measure"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_two(
    options: list[str], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *options]) == 2
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_there_is_nothing_to_go_on_with_where_nothing_was_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", "--tiny", "--resume", "--out", str(tmp_path)]) == 2
    assert f"no unfinished calibration of cpu in {tmp_path}; leave it off" in capsys.readouterr().err


def test_a_new_run_says_that_another_one_was_not_finished(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "calibration" / CPU
    folder.mkdir(parents=True)
    (folder / f".one{UNFINISHED}").touch()
    assert main(["calibrate", "--tiny", "--only", "router", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "was not finished: --resume would go on with it" in said.err
    (path,) = folder.glob("*.json")
    assert f"written to {path}" in said.out.replace("\n", "")
    assert {one.what.operation for one in read_calibration(path).measurements} == {"router"}
