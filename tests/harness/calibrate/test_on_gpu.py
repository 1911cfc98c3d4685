"""The whole list at toy shapes on a GPU: what is installed runs, and nothing else is missing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moe_bench.results.calibration import read_calibration
from moe_bench.results.calibration_tasks import OPERATIONS


@pytest.mark.gpu("a CPU has no CUDA events, clocks and L2 to read")
def test_the_whole_list_runs_on_a_gpu(tmp_path: Path) -> None:
    command = (sys.executable, "-m", "moe_bench", "calibrate", "--tiny", "--json", "--out", str(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    calibration = read_calibration(Path(json.loads(done.stdout)["path"]))
    assert calibration.provenance.gpu.name == torch.cuda.get_device_name()
    assert {one.what.operation for one in calibration.measurements} == set(OPERATIONS)
    failed = [one for one in calibration.unmeasured if not one.reason.endswith(" is not installed")]
    assert failed == []
