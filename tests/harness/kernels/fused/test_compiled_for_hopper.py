"""What ptxas makes of every kernel for an H100, which needs none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """By kernel, from a process whose Triton compiles; this one's may interpret."""
    cache = tmp_path_factory.mktemp("triton")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.harness.kernels.fused.compiled_for_hopper"],
        env={**environment, "TRITON_CACHE_DIR": str(cache), "PYTHONWARNINGS": "ignore"},
        cwd=Path(__file__).parents[4],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_no_kernel_spills_registers(kernels: dict[str, dict[str, int]]) -> None:
    assert {name: found["spilled_bytes"] for name, found in kernels.items() if found["spilled_bytes"]} == {}


def test_two_programs_of_the_weight_gradient_share_an_sm(kernels: dict[str, dict[str, int]]) -> None:
    """An SM of an H100 has 65,536 registers and 227 KiB of shared memory (CUDA's compute capability 9.0)."""
    found = kernels["weight_gradient"]
    assert found["num_tensor_core_calls"] > 0
    assert 2 * found["registers"] * 8 * 32 <= 65536
    assert 2 * (found["shared_bytes"] + 1024) <= 227 * 1024
