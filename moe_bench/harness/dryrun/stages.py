"""Several ranks of one recipe, one forked process each, a few at a time."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from functools import partial

from moe_bench.harness.dryrun.corrections import corrections
from moe_bench.harness.dryrun.one_rank import dry_run_rank
from moe_bench.harness.dryrun.outcome import DryRun, RankDryRun, RankOutcome
from moe_bench.harness.dryrun.token_counts import SenderCounts
from moe_bench.harness.workers import Seat, run_forked
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import Plan


def dry_run(
    asked: Recipe,
    plan: Plan,
    ranks: Sequence[int],
    *,
    counts: SenderCounts | None = None,
    num_micro_batches: int | None = None,
) -> DryRun:
    """Dry-run these ranks of `plan`, which was derived from `asked`.

    `counts` and `num_micro_batches` are those of `dry_run_rank`. Several ranks run in forked processes, as
    many at a time as there are cores; this process must then have one thread and must have run no tensor
    operation. Raises what `dry_run_rank` raises.
    """
    run = partial(dry_run_rank, plan.recipe, counts=counts, num_micro_batches=num_micro_batches)
    if len(ranks) == 1:
        runs = [run(ranks[0])]
    else:
        runs = []
        for batch in itertools.batched(ranks, len(os.sched_getaffinity(0))):
            runs += run_forked(len(batch), partial(_run_one, batch, run), on_progress=lambda content: None)
    return DryRun(
        plan=plan,
        ranks=tuple(
            RankOutcome(run=run, corrections=corrections(asked, plan.recipe, run.pipeline_rank))
            for run in runs
        ),
    )


def _run_one(batch: Sequence[int], run: partial[RankDryRun], seat: Seat) -> RankDryRun:
    return run(batch[seat.rendezvous.rank])
