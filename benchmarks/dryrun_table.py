"""Every shipped recipe and pipeline stage, closed form beside dry run, as the table of docs/dryrun_table.md.

    python benchmarks/dryrun_table.py > docs/dryrun_table.md
    python benchmarks/dryrun_table.py --only qwen3_30b_a3b

Runs for about ten seconds of one core per stage.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from moe_bench.analysis.comms import step_transfers
from moe_bench.analysis.memory import GIB, rank_memory
from moe_bench.analysis.params import rank_params
from moe_bench.analysis.rank_flops import rank_flops
from moe_bench.harness.dryrun.corrections import corrections
from moe_bench.harness.dryrun.outcome import RankDryRun
from moe_bench.harness.dryrun.start import load_dry_run
from moe_bench.report.dryrun_view import state_bytes
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.derive_dryrun import dryrun_plan, ranks_to_run
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

HEAD = """# Closed form beside dry run

**Not compared with a GPU.** Both columns are computed: the closed form by `moe_bench/analysis`, the other by
stepping one rank of every pipeline stage through Megatron-Core 0.19.2 on tensors without data
(`moe-bench dryrun`, see dryrun.md). What they agree on is arithmetic, not measurement.

Written by `python benchmarks/dryrun_table.py`, in the form that the dry run builds: torch-native BF16
kernels, all-to-all dispatch, balanced routing, states on the device. `=` is equal to the last parameter, byte
or operation, by collective, group and phase, by kernel, layer and pass; otherwise the dry run's total over
the closed form's. *states* are weights, gradients and optimizer states, *rest* is everything else at the
peak, in GiB, closed form (with what torch's flash kernel pads for MLA) / dry run; *peak* is the closed form's
total over the dry run's.

What is not equal, and why:

- Kimi K2 sends tokens to 384 experts, which do not divide the choices of a micro batch: rank 0's experts get
  one token more of some senders.
- With Megatron-FSDP weights are gathered for both passes of every micro batch and gradients reduced after
  each, with rows padded to the ranks; the closed form counts neither.
- *rest* is lower in the closed form. It leaves out the copy of the logits that Transformer Engine 2.20.2's
  loss keeps (2.16.0's keeps none), the weight gradient of the product whose backward pass runs, what biases
  of experts keep, what pipeline neighbours have sent, and what is held past its use.

| recipe | stage | parameters | traffic | FLOPs | states | rest | peak | peak at |
|---|---|---|---|---|---|---|---|---|"""


@dataclass(frozen=True, slots=True)
class Job:
    """One stage of one recipe."""

    name: str
    """Of the recipe as asked; the derived one has another precision and so another name."""
    recipe: Recipe
    pipeline_rank: int


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
    print(HEAD)
    # a process of its own for each: Megatron-Core leaves things behind
    with multiprocessing.get_context("fork").Pool(options.processes, maxtasksperchild=1) as pool:
        for row in pool.imap(_row, jobs, chunksize=1):
            print(row, flush=True)


def _jobs(recipe: Recipe, *, only: str) -> Iterator[Job]:
    if only in recipe.name:
        derived = dryrun_plan(recipe, modified=()).recipe
        yield from (Job(recipe.name, derived, stage) for stage in range(derived.parallel.pipeline))


def _row(job: Job) -> str:
    from moe_bench.harness.dryrun.one_rank import dry_run_rank

    recipe, stage = job.recipe, job.pipeline_rank
    run = dry_run_rank(recipe, ranks_to_run(recipe, rank=None, all_stages=True)[stage])
    params, states = rank_params(recipe, stage), state_bytes(run)
    closed_states, closed_rest = closed_memory(recipe, stage)
    cells = (
        job.name,
        f"{stage} of {recipe.parallel.pipeline}",
        _compared(run.num_dense_params + run.num_expert_params, params.dense + params.expert),
        _traffic(run, recipe, stage),
        _flops(run, recipe, stage),
        f"{closed_states / GIB:.2f} / {states / GIB:.2f}",
        f"{closed_rest / GIB:.2f} / {(run.peak.num_bytes - states) / GIB:.2f}",
        f"{(closed_states + closed_rest) / run.peak.num_bytes - 1:+.1%}",
        f"{run.peak.phase} of {run.peak.module}",
    )
    return "| " + " | ".join(cells) + " |"


def closed_memory(recipe: Recipe, stage: int) -> tuple[int, int]:
    """States and rest in closed form, with what torch's flash kernel pads for MLA."""
    closed = rank_memory(recipe, stage)
    padding = sum(term.num_bytes or 0 for term in corrections(recipe, recipe, stage))
    return closed.states_bytes, closed.total_bytes - closed.states_bytes - padding


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
