"""The checks of this folder on the CPU, under Triton's interpreter, in one process for all."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_every_kernel_agrees_with_its_reference_under_the_interpreter(marked: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider"]
    run = subprocess.run(
        [*command, "-k", "interpreter", "-m", marked, "--ignore", __file__, str(HERE)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert re.search(r"\d+ passed", run.stdout)
    assert "skipped" not in run.stdout
