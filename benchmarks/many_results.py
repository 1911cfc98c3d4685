"""Ten thousand records of 256 ranks and 50 steps: how long their index takes, and what reads it afterwards.

    python benchmarks/many_results.py FOLDER
    python benchmarks/many_results.py FOLDER --num-records 500
    python benchmarks/many_results.py FOLDER --num-layers 2

Writes 45 GB of made-up records into FOLDER, which must not exist, and leaves them there; with loads of two
layers 4 GB, which is enough for what reads the index. Every line of the table is one command; its memory is
the largest sum over it and its processes, looked at fifty times a second.
"""

from __future__ import annotations

import argparse
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from moe_bench.results.index import INDEX_NAME
from moe_bench.results.record import GitState, GpuFacts, Implementations, Provenance, Record, Samples
from moe_bench.results.store import record_folder
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import full_plan

RECIPES = ("qwen3_235b_a22b/h100_sxm_256g_bf16", "qwen3_30b_a3b/h100_sxm_16g_bf16")
NUM_RANKS, NUM_WARMUP, NUM_TIMED = 256, 5, 50
NUM_LAYERS, NUM_EXPERTS = 94, 128
"""Those whose loads are made up: of Qwen3-235B, the most layers of any recipe."""
GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class Cost:
    """What one command took."""

    wall_s: float
    peak_bytes: int
    """Resident memory of the command and all its processes."""


def main() -> None:
    """Write the records, time the readers, print a Markdown table."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    arguments.add_argument("folder", type=Path)
    arguments.add_argument("--num-records", type=int, default=10_000)
    arguments.add_argument("--num-layers", type=int, default=NUM_LAYERS)
    options = arguments.parse_args()
    root, num_records = options.folder, options.num_records
    num_bytes = write_records(root, num_records, options.num_layers)
    print(f"{num_records:,} records of {num_bytes / MIB:.1f} MiB\n")
    print("| call | seconds | peak MiB |\n|---|--:|--:|", flush=True)
    listing = ("results", "--results", str(root))
    cost = timed(listing, is_enough=lambda: num_indexed(root) >= num_records / 2)
    report(f"results, killed on the way: {num_indexed(root):,} records stay indexed", cost)
    first = root / RECIPES[0]
    for what, command in (
        ("results, going on from there", listing),
        ("results, again", listing),
        ("results --model --csv, every line", (*listing, "--model", "qwen3_30b_a3b", "--csv")),
        ("results show", (*listing, "show", newest(first).stem)),
        ("report, every record a line", ("report", str(root), "--format", "csv")),
        ("reproduce, both recipes", ("reproduce", *RECIPES, "--results", str(root))),
        ("reproduce, every recipe", ("reproduce", "--results", str(root))),
        ("report --scaling", ("report", str(root), "--scaling", "--model", "qwen3_30b_a3b")),
        ("report --html", ("report", str(root), "--html", str(root / "page.html"))),
        ("jobs", ("jobs", "--results", str(root))),
    ):
        report(what, timed(command))
    newest(first).unlink()
    report("results, one record removed", timed(listing))
    (root / INDEX_NAME).unlink()
    report("results, index deleted", timed(listing))


def report(what: str, cost: Cost) -> None:
    """One line of the table."""
    print(f"| {what} | {cost.wall_s:.2f} | {cost.peak_bytes / MIB:.0f} |", flush=True)


def timed(command: tuple[str, ...], is_enough: Callable[[], bool] = lambda: False) -> Cost:
    """Run `moe-bench command` until it ends, or kill it as soon as it `is_enough`."""
    started_s = time.perf_counter()
    process = psutil.Popen((sys.executable, "-m", "moe_bench", *command), stdout=subprocess.DEVNULL)
    peak_bytes = 0
    while process.poll() is None:
        peak_bytes = max(peak_bytes, resident_bytes(process))
        if is_enough():
            process.kill()
        time.sleep(0.02)
    if process.returncode not in (0, -signal.SIGKILL):
        sys.exit(f"moe-bench {' '.join(command)} ended with {process.returncode}")
    return Cost(time.perf_counter() - started_s, peak_bytes)


def resident_bytes(process: psutil.Process) -> int:
    """What the process and all below it hold; pages that they share count for each."""
    total = 0
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            total += one.memory_info().rss
    return total


def num_indexed(folder: Path) -> int:
    """Records that the index of `folder` holds now."""
    path = folder / INDEX_NAME
    if not path.is_file():
        return 0
    with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10) as db:
        tables = db.execute("SELECT name FROM sqlite_master WHERE name = 'file'").fetchall()
        return int(db.execute("SELECT count(*) FROM file").fetchone()[0]) if tables else 0


def newest(folder: Path) -> Path:
    """The last record of `folder` by name."""
    return max(folder.glob("*.json"))


def write_records(root: Path, num_records: int, num_layers: int) -> int:
    """Write `num_records` files below `root` and return the size of one.

    One record of each recipe is made up in full; the others are copies with their own start, commit and job.
    """
    root.mkdir(parents=True)
    loader = Loader(root=recipes_root())
    generator = random.Random(1)
    size = 0
    for offset, name in enumerate(RECIPES):
        recipe = loader.recipe(find_recipe(name, loader))
        found = made_up(recipe, num_layers, generator)
        text = found.model_dump_json()
        folder = record_folder(root, found.plan)
        folder.mkdir(parents=True)
        for number in range(offset, num_records, len(RECIPES)):
            day, second = divmod(number, 86_400 // 40)
            start = f"2026-{1 + day // 28:02}-{1 + day % 28:02}T{second // 90:02}:{second % 60:02}:00+00:00"
            commit, job = f"{number // 100:040x}", f"job{number}"
            one = text.replace("STARTED_AT", start).replace("COMMIT", commit).replace("JOB_ID", job)
            stamp = start.replace("-", "").replace(":", "").split("+")[0]
            (folder / f"{stamp}Z-{commit[:8]}-{job}.json").write_text(one + "\n", encoding="utf-8")
            size = len(one)
    return size


def made_up(recipe: Recipe, num_layers: int, generator: random.Random) -> Record:
    """A record of the size of a run of 256 GPUs; no number in it was measured."""

    def steps(num_steps: int) -> tuple[float, ...]:
        return tuple(generator.gauss(10, 0.05) for _ in range(num_steps))

    gpu = GpuFacts(
        name="NVIDIA H100 80GB HBM3", driver_version="580.65.06", power_limit_w=700.0, sm_clock_hz=1.98e9,
        max_sm_clock_hz=1.98e9, memory_bytes=80 * GIB, ecc_enabled=True, compute_mode="Default",
    )  # fmt: skip
    return Record(
        plan=full_plan(recipe, modified=()),
        provenance=Provenance(
            started_at="STARTED_AT",
            command=("moe-bench", "run", recipe.name),
            job_id="JOB_ID",
            git=GitState(commit="COMMIT", branch="main", is_dirty=False),
            python_version="3.12.3",
            packages={"torch": "2.15.0", "megatron-core": "0.19.2"},
            hosts=tuple(f"node{rank // 8:03}" for rank in range(NUM_RANKS)),
            cpu_model="made up",
            os="Linux",
            container=None,
            gpus=(gpu,) * NUM_RANKS,
            topology="made up " * 400,
            nccl_version="2.28.3",
            cuda_version="13.0",
            environment={},
        ),
        samples=Samples(
            warmup_step_times_s=tuple(steps(NUM_WARMUP) for _ in range(NUM_RANKS)),
            step_times_s=tuple(steps(NUM_TIMED) for _ in range(NUM_RANKS)),
            losses=steps(NUM_WARMUP + NUM_TIMED),
            grad_norms=steps(NUM_WARMUP + NUM_TIMED),
            peak_memory_bytes=tuple(generator.randrange(60 * GIB, 75 * GIB) for _ in range(NUM_RANKS)),
            tokens_per_expert=tuple(
                tuple(
                    tuple(generator.randrange(200_000, 320_000) for _ in range(NUM_EXPERTS))
                    for _ in range(num_layers)
                )
                for _ in range(NUM_TIMED)
            ),
            energy_j=tuple(generator.gauss(3e5, 1e4) for _ in range(NUM_RANKS)),
            implementations=Implementations(
                attention="made up",
                experts="made up",
                dispatcher="made up",
                normalization="made up",
                optimizer="made up",
            ),
            patches=(),
        ),
    )


if __name__ == "__main__":
    main()
