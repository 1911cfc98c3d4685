"""Every Triton kernel compiled for an H100, which needs none: read by Triton, and, slower, by ptxas."""

import importlib
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton import JITFunction

from moe_bench.harness import kernels as package
from tests.harness.kernels.compiled_for_hopper import launches, triton_ir

LAUNCHES = launches()


@pytest.mark.parametrize("name", LAUNCHES)
def test_triton_reads_the_kernel_with_the_types_of_its_launch(name: str) -> None:
    """The interpreter runs kernels as Python, and so passes over names that only exist for a type checker."""
    assert f"tt.func public @{LAUNCHES[name].kernel.__name__}" in triton_ir(LAUNCHES[name])


def test_no_kernel_is_left_out() -> None:
    modules = [
        importlib.import_module(module.name)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
    ]
    kernels = {
        value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    assert kernels == {launch.kernel for launch in LAUNCHES.values()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """By kernel, from a process of its own with an empty cache."""
    cache = tmp_path_factory.mktemp("triton")
    run = subprocess.run(
        [sys.executable, "-m", "tests.harness.kernels.compiled_for_hopper"],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), "PYTHONWARNINGS": "ignore"},
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


@pytest.mark.slow
def test_no_kernel_spills_registers(compiled: dict[str, dict[str, int]]) -> None:
    assert {name: found["spilled_bytes"] for name, found in compiled.items() if found["spilled_bytes"]} == {}


@pytest.mark.slow
def test_two_programs_of_the_weight_gradient_share_an_sm(compiled: dict[str, dict[str, int]]) -> None:
    """An SM of an H100 has 65,536 registers and 227 KiB of shared memory (CUDA's compute capability 9.0)."""
    found = compiled["weight_gradient"]
    assert found["num_tensor_core_calls"] > 0
    assert 2 * found["registers"] * 8 * 32 <= 65536
    assert 2 * (found["shared_bytes"] + 1024) <= 227 * 1024
