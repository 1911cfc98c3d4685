"""Prints every limit on time and memory that the suite sets itself, beside what this machine measures.

    python benchmarks/limits.py                 all
    python benchmarks/limits.py list dryrun     those whose name contains one of the words

Wall time and peak memory of whole commands, imports included: the median of several runs after one not
counted, which leaves compiled modules behind as an installation does. The machine matters: the limits are
meant for two quiet cores. Exits with 5 where a limit is broken.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """A command and what it may take."""

    name: str
    arguments: tuple[str, ...]
    limit_s: float
    limit_bytes: int | None = None
    num_runs: int = 5


LIMITS = (
    Limit(name="list", arguments=("list",), limit_s=0.4),
    Limit(name="show", arguments=("show", "deepseek_v3"), limit_s=0.4),
    Limit(
        name="submit (dry run)",
        arguments=("submit", "deepseek_v3", "--dry-run", "--set", "container=null"),
        limit_s=0.4,
    ),
    Limit(name="check one", arguments=("check", "deepseek_v3"), limit_s=1.0),
    Limit(name="project", arguments=("project", "deepseek_v3"), limit_s=1.0),
    Limit(
        name="project seven sizes",
        arguments=("project", "deepseek_v3", "--num-gpus", "256,512,1024,2048,4096,8192,16384"),
        limit_s=1.5,
    ),
    Limit(
        name="accuracy, models left out",
        arguments=("accuracy", "--cross-validate", "model"),
        limit_s=120.0,
        num_runs=1,
    ),
    Limit(name="report of a record per recipe", arguments=("report", "{records}"), limit_s=2.0),
    Limit(
        name="dryrun of the fewest micro batches",
        arguments=("dryrun", "deepseek_v3", "--micro-batches", "4"),
        limit_s=18.0,
        limit_bytes=3 * GIB,
        num_runs=3,
    ),
    Limit(
        name="dryrun of one rank",
        arguments=("dryrun", "deepseek_v3"),
        limit_s=30.0,
        limit_bytes=3 * GIB,
        num_runs=3,
    ),
    Limit(
        name="dryrun of all stages",
        arguments=("dryrun", "deepseek_v3", "--all-stages"),
        limit_s=70.0,
        limit_bytes=3 * GIB,
        num_runs=1,
    ),
    Limit(
        name="smoke run",
        arguments=("run", "deepseek_v3", "--scale", "smoke", "--out", "{out}"),
        limit_s=60.0,
        num_runs=3,
    ),
)


def measured(limit: Limit, places: dict[str, str]) -> tuple[float, int]:
    """Median wall time in seconds, and the largest peak memory in bytes, of one command."""
    command = [sys.executable, "-m", "moe_bench", *(part.format(**places) for part in limit.arguments)]
    # images often set this one, and every start would compile the whole suite anew
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    times_s = []
    for _ in range(limit.num_runs + 1):
        start_s = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        times_s.append(time.perf_counter() - start_s)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr}")
    # the largest child so far: the commands run from the lightest to the heaviest
    peak_bytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    return statistics.median(times_s[1:]), peak_bytes


def fill(folder: Path) -> None:
    """Put one made-up record per recipe into `folder`, for `report` to read."""
    from moe_bench.results.store import write_record
    from moe_bench.spec.catalogue import recipe_paths
    from moe_bench.spec.scale import full_plan
    from tests.results.records import LOADER, record

    for index, path in enumerate(recipe_paths(LOADER.root)):
        plan = full_plan(LOADER.recipe(path), modified=())
        write_record(folder, record(plan, step_times_s=((1.0,) * 40,) * 8, job_id=f"pid{index}"))


def main(words: list[str]) -> int:
    chosen = [limit for limit in LIMITS if not words or any(word in limit.name for word in words)]
    table = Table(box=None, header_style="bold")
    for heading in ("command", "limit s", "measured s", "limit MiB", "peak MiB so far", ""):
        table.add_column(heading, justify="left" if heading in ("command", "") else "right")
    is_broken = False
    with tempfile.TemporaryDirectory() as folder:
        records, out = Path(folder) / "records", Path(folder) / "out"
        fill(records)
        for limit in track(chosen, console=Console(stderr=True), transient=True):
            time_s, peak_bytes = measured(limit, {"records": str(records), "out": str(out)})
            over = time_s > limit.limit_s or (
                limit.limit_bytes is not None and peak_bytes > limit.limit_bytes
            )
            is_broken |= over
            table.add_row(
                limit.name,
                f"{limit.limit_s:g}",
                f"{time_s:.2f}",
                "-" if limit.limit_bytes is None else f"{limit.limit_bytes / MIB:.0f}",
                f"{peak_bytes / MIB:.0f}",
                "over" if over else "",
            )
    Console().print(table)
    return 5 if is_broken else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(main(sys.argv[1:]))
