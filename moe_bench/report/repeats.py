"""What several equal runs say together: the throughput, and how far it varies from run to run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from moe_bench.analysis.equivalence import ratio_to_value
from moe_bench.results.metrics import gpu_s_per_token, mean_tokens_per_s_per_gpu
from moe_bench.results.record import Record


def repeats_line(records: Sequence[Record]) -> str:
    """`3 runs: 812.1 tokens/s/GPU, 806.3 to 818 between runs (95 %), spread 0.9 %`, the spread being slowest
    over fastest, less one; ValueError for fewer than two.
    """
    if len(records) < 2:
        raise ValueError("one run has no spread between runs")
    unit = "process" if records[0].plan.recipe.system.gpu is None else "GPU"
    runs = [gpu_s_per_token(record) for record in records]
    mean = mean_tokens_per_s_per_gpu(runs)
    interval = ratio_to_value(runs, value_s=1 / mean)
    assert interval is not None  # noqa: S101 - two runs always have one
    low, high = interval.low_ratio * mean, interval.high_ratio * mean
    medians_s = [statistics.median(run) for run in runs]
    return (
        f"{len(records)} runs: {mean:,.4g} tokens/s/{unit}, {low:,.4g} to {high:,.4g} between runs (95 %), "
        f"spread {max(medians_s) / min(medians_s) - 1:.2%}"
    )
