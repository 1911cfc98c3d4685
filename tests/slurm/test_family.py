"""A scaling family through a real Slurm: written, submitted, one member failing, and read back as a table."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.scale import smoke_plan
from moe_bench.spec.write import write_recipe
from tests.slurm.conftest import Slurm

pytestmark = pytest.mark.slurm

MEMORY_ERROR = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."


def toy_recipe(folder: Path) -> Path:
    """The toy of Qwen3-30B-A3B as a recipe of its own: two processes at full scale."""
    loader = Loader(root=recipes_root())
    base = loader.recipe(recipes_root() / "qwen3_30b_a3b" / "h100_sxm_8g_bf16.yaml")
    toy = smoke_plan(base, host=loader.system("cpu_host"), modified=()).recipe
    return write_recipe(toy, folder, comment="A toy for a test.", loader=loader)


def python_that_fails_on(folder: Path, words: str) -> str:
    """An interpreter whose ranks of recipes named with `words` end as PyTorch does without memory."""
    path = folder / "python"
    path.write_text(
        f'#!/bin/bash\nif [[ "$1 $2 $3" == "-m moe_bench run" && $4 == *{words}* ]]; then\n'
        f'echo "{MEMORY_ERROR}" >&2\nexit 1\nfi\nexec {sys.executable} "$@"\n'
    )
    path.chmod(0o755)
    return str(path)


def test_a_family_is_submitted_and_its_failed_member_stays_in_the_table(
    slurm: Slurm, checkout: Path, home: Path
) -> None:
    recipe = toy_recipe(home)
    here = {"MOE_BENCH_PYTHON": python_that_fails_on(home, "_8g_"), "PYTHONPATH": str(checkout)}

    def moe_bench(*words: str) -> tuple[int, str, str]:
        done = slurm.run(sys.executable, "-m", "moe_bench", *words, cwd=home, **here)
        return done.returncode, done.stdout, done.stderr

    code, told, refused = moe_bench("submit", str(recipe), "--num-gpus", "2,3,4,8")
    assert code == 0, refused
    assert refused.startswith("--num-gpus 3: parallel.expert: ETP1 x EP2 x PP1 = 2 GPUs, num_gpus = 3: ")
    assert refused.endswith("; use 2 or 4 GPUs, or EP1; nearest legal sizes: 2 and 4\n")
    job_ids = [int(line.split()[2].rstrip(":")) for line in told.splitlines() if line.startswith("submitted")]
    families = home / "families" / "qwen3_30b_a3b"
    written = sorted(path.name for path in families.iterdir())
    assert written == [
        "cpu_host_2g_bf16.yaml",
        "cpu_host_4g_bf16_weak_of_2g.yaml",
        "cpu_host_8g_bf16_weak_of_2g.yaml",
    ]
    assert moe_bench("check", "families")[:2] == (0, "3 recipes, all legal\n")

    states = [slurm.ended(job_id)["JobState"] for job_id in job_ids]
    assert states == ["COMPLETED", "COMPLETED", "FAILED"], "\n".join(map(slurm.output, job_ids))
    code, table, errors = moe_bench("report", "--scaling", "--model", "qwen3_30b_a3b", "--format", "csv")
    assert code == 0, errors
    rows = [row for row in csv.DictReader(table.splitlines()) if row["kind"] == "measured"]
    assert [row["num_gpus"] for row in rows] == ["2", "4", "8"]
    # weak: 4 micro batches of 2 sequences for each of 2, 4 and 8 replicas
    assert [row["global_batch_size"] for row in rows] == ["16", "32", "64"]
    assert {row["mode"] for row in rows} == {"weak"}
    assert [bool(row["tokens_per_s_per_gpu"]) for row in rows] == [True, True, False]
    assert rows[0]["efficiency_pct"] == "100.0"
    assert rows[2]["remark"] == f"out of memory: {MEMORY_ERROR}"

    code, _, errors = moe_bench("report", "--scaling", "--model", "qwen3_30b_a3b", "--plot", "scaling.svg")
    assert code == 0, errors
    assert (home / "scaling.svg").read_text().startswith("<?xml")
