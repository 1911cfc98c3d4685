"""The peak memory of a slice's rank by a dry run, in a process of its own."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from moe_bench.harness.dryrun.start import load_dry_run
from moe_bench.spec.derive_dryrun import dryrun_plan
from moe_bench.spec.scale import Plan


def slice_peak_bytes(plan: Plan) -> int:
    """Bytes that the rank of `plan` holds at most, corrected for the kernels that a dry run stands in for.

    The dry run replaces devices and kernels, so it runs in a new process. Raises what `dry_run_rank` raises.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_bytes, plan).result()


def _peak_bytes(plan: Plan) -> int:
    found = load_dry_run()(plan.recipe, dryrun_plan(plan.recipe, modified=plan.modified), (plan.rank,))
    (outcome,) = found.ranks
    return outcome.corrected_peak_bytes
