"""Every shipped recipe and pipeline stage, closed form beside dry run, as the table of docs/dryrun_table.md.

    python benchmarks/dryrun_table.py > docs/dryrun_table.md
    python benchmarks/dryrun_table.py --only qwen3_30b_a3b

Runs for about ten seconds of one core per stage.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from moe_bench.analysis.comms import step_transfers
from moe_bench.analysis.memory import GIB, rank_memory
from moe_bench.analysis.params import rank_params
from moe_bench.analysis.rank_flops import rank_flops
from moe_bench.harness.dryrun.outcome import RankDryRun
from moe_bench.harness.dryrun.start import load_dry_run
from moe_bench.report.dryrun_view import state_bytes
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.derive_dryrun import dryrun_plan, ranks_to_run
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

HEAD = """# Closed form beside dry run

Both columns are computed: the closed form by `moe_bench/analysis`, the other by stepping one rank of every
pipeline stage through Megatron-Core 0.19.2 on tensors without data (`moe-bench dryrun`, see dryrun.md). **No
dry run has been compared with a GPU**; the closed form of memory has, with 23 published measurements
(accounting.md).

Written by `python benchmarks/dryrun_table.py`, in the form that the dry run builds: torch-native kernels in
BF16 or FP8 with a scale per row, all-to-all dispatch, balanced routing, states on the device. `=` is equal to
the last parameter, byte or operation, by collective, group and phase, by kernel, layer and pass; otherwise
the dry run's total over the closed form's. Memory is in GiB at the fullest moment of the step, closed form /
dry run, by the pass that takes it: *states* are weights, gradients and optimizer states, *rest* is everything
else, *peak* is the closed form's total over the dry run's.

{counts}
"""
COLUMNS = (
    "recipe", "stage", "parameters", "traffic", "FLOPs",
    "states", "activations", "recomputed", "backward", "pipeline", "rest", "peak", "peak at",
)  # fmt: skip
TOLERATED_PEAK_FRACTION = 0.02
TOLERATED_REST_FRACTION = 0.05
MOVING = ("activations", "recomputed", "backward", "pipeline")
"""Categories with a column of their own; inputs and what Megatron-FSDP gathers are in the rest."""


@dataclass(frozen=True, slots=True)
class Job:
    """One stage of one recipe."""

    name: str
    """Of the recipe as asked; the derived one has another precision and so another name."""
    recipe: Recipe
    pipeline_rank: int


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table, and in what it agrees."""

    text: str
    is_exact: bool
    is_peak_near: bool
    is_rest_near: bool


def main() -> None:
    """Print the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--only", default="", help="part of the names of the recipes to run")
    arguments.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    options = arguments.parse_args()
    loader = Loader(root=recipes_root())
    jobs = [
        job for path in recipe_paths(loader.root) for job in _jobs(loader.recipe(path), only=options.only)
    ]
    load_dry_run()
    rows = []
    # a process of its own for each: Megatron-Core leaves things behind
    with multiprocessing.get_context("fork").Pool(options.processes, maxtasksperchild=1) as pool:
        for row in pool.imap(_row, jobs, chunksize=1):
            print(row.text, file=sys.stderr, flush=True)
            rows.append(row)
    print(HEAD.format(counts=_counts(rows)))
    print(_line(COLUMNS))
    print(_line(["---"] * len(COLUMNS)))
    for row in rows:
        print(row.text)


def _counts(rows: Sequence[Row]) -> str:
    """How many stages agree."""
    num_exact, num_peak, num_rest = (
        sum(getattr(row, name) for row in rows) for name in ("is_exact", "is_peak_near", "is_rest_near")
    )
    return (
        f"Of {len(rows)} stages {num_exact} are equal in parameters, traffic and FLOPs, {num_peak} within "
        f"{TOLERATED_PEAK_FRACTION:.0%} of the peak, and {num_rest} within {TOLERATED_REST_FRACTION:.0%} of "
        "the rest."
    )


def _jobs(recipe: Recipe, *, only: str) -> Iterator[Job]:
    if only in recipe.name:
        derived = dryrun_plan(recipe, modified=()).recipe
        yield from (Job(recipe.name, derived, stage) for stage in range(derived.parallel.pipeline))


def _row(job: Job) -> Row:
    from moe_bench.harness.dryrun.one_rank import dry_run_rank

    recipe, stage = job.recipe, job.pipeline_rank
    run = dry_run_rank(recipe, ranks_to_run(recipe, rank=None, all_stages=True)[stage])
    params, closed = rank_params(recipe, stage), rank_memory(recipe, stage)
    states, found = state_bytes(run), run.peak.bytes_by_category
    rest, closed_rest = run.peak.num_bytes - states, closed.total_bytes - closed.states_bytes
    exact = (
        _compared(run.num_dense_params + run.num_expert_params, params.dense + params.expert),
        _traffic(run, recipe, stage),
        _flops(run, recipe, stage),
    )
    peak_fraction = closed.total_bytes / run.peak.num_bytes - 1
    by_category = closed.bytes_by_category
    cells = (
        job.name,
        f"{stage} of {recipe.parallel.pipeline}",
        *exact,
        _both(closed.states_bytes, states),
        *(_both(by_category[name], found.get(name, 0)) for name in MOVING),
        _both(closed_rest, rest),
        f"{peak_fraction:+.1%}",
        f"{run.peak.phase} of {run.peak.module}",
    )
    return Row(
        text=_line(cells),
        is_exact=exact == ("=", "=", "="),
        is_peak_near=abs(peak_fraction) <= TOLERATED_PEAK_FRACTION,
        is_rest_near=abs(closed_rest / rest - 1) <= TOLERATED_REST_FRACTION,
    )


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _both(closed_bytes: int, found_bytes: int) -> str:
    """Closed form / dry run in GiB; nothing where both are zero."""
    return f"{closed_bytes / GIB:.2f} / {found_bytes / GIB:.2f}" if closed_bytes or found_bytes else ""


def _compared(found: int, counted: int) -> str:
    return "=" if found == counted else f"{found / counted:.4f}"


def _traffic(run: RankDryRun, recipe: Recipe, stage: int) -> str:
    """Bytes by collective, group and phase; scalars of the optimizer are not in the closed form."""
    found: Counter[tuple[str, ...]] = Counter()
    counted: Counter[tuple[str, ...]] = Counter()
    for line in run.traffic:
        if line.phase != "optimizer":
            found[line.op, line.group, line.phase] += line.num_bytes
    for transfer in step_transfers(recipe, stage):
        counted[transfer.op, transfer.group, transfer.phase] += transfer.num_bytes
    return "=" if found == counted else _compared(found.total(), counted.total())


def _flops(run: RankDryRun, recipe: Recipe, stage: int) -> str:
    """Operations by kind of kernel, layer and pass, recomputation apart."""
    found: Counter[tuple[str, ...]] = Counter()
    counted: Counter[tuple[str, ...]] = Counter()
    for line in run.flops:
        found[line.kind, line.layer, line.phase] += line.num_flops
    for part in rank_flops(recipe, stage):
        counted[part.kernel, part.place, "forward"] += part.forward_flops
        counted[part.kernel, part.place, "backward"] += part.dgrad_flops + part.wgrad_flops
        counted[part.kernel, part.place, "recompute"] += part.recompute_flops
    return "=" if found == counted else _compared(found.total(), counted.total())


if __name__ == "__main__":
    main()
