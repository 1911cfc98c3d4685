"""`moe-bench parity` inside a job of a real Slurm, whose srun starts the ranks of every run."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import REPOSITORY, Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

TEXT = REPOSITORY / "tests" / "data" / "moby_dick.txt"
FP32 = ("--set", "precision=fp32", "--set", "optimizer.gradient_dtype=fp32")


def moe_bench(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "moe_bench", *words)


def test_srun_starts_the_ranks_of_every_run_anew(slurm: Slurm, checkout: Path, home: Path) -> None:
    data = ("data", "build", str(TEXT), "--split", "paragraph", "--out", "moby")
    assert slurm.run(*moe_bench(*data), cwd=home, PYTHONPATH=str(checkout)).returncode == 0
    asked = (
        "parity",
        "qwen3_30b_a3b",
        "--scale",
        "smoke",
        "--data",
        "moby",
        "--steps",
        "2",
        "--repeats",
        "2",
    )
    varied = ("--vary", "dispatcher=allgather", "--launcher", "srun", "--out", "shared", "--json")
    line = shlex.join(moe_bench(*asked, *FP32, "--set", "overlap.expert_parallel=false", *varied))
    job_id = slurm.sbatch(
        "--nodes=2", "--ntasks-per-node=2", f"--wrap={line} > found.json", cwd=home, PYTHONPATH=str(checkout)
    )
    fields = slurm.ended(job_id, within_s=400)
    assert (fields["JobState"], fields["ExitCode"]) == ("COMPLETED", "0:0"), slurm.output(job_id)
    found = json.loads((home / "found.json").read_text())
    assert found["is_equal"]
    assert found["provenance"]["job_id"] == f"job{job_id}"
    assert found["base"]["plan"]["recipe"]["parallel"]["num_gpus"] == 2
    assert [path.name for path in (home / "shared").iterdir()] == ["parity"]
