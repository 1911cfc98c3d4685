"""Several equal runs in one line, against hand arithmetic."""

import math

import pytest

from moe_bench.report.repeats import repeats_line
from tests.report.series import runs
from tests.results.records import RECIPE, full, record


def test_the_line_gives_the_mean_and_its_interval_between_runs() -> None:
    made = [record(full(), step_times_s=((step_s,) * 10,) * 8, repeat=i) for i, step_s in enumerate((1, 1.1))]
    mean = RECIPE.tokens_per_step / 8 / math.sqrt(1.1)
    # two runs: s = ln 1.1 / sqrt(2), t(0.975, 1) = 12.706, half width t s / sqrt(2)
    half = 12.7062 * math.log(1.1) / 2
    low, high = mean * math.exp(-half), mean * math.exp(half)
    assert repeats_line(made) == (
        f"2 runs: {mean:,.4g} tokens/s/GPU, {low:,.4g} to {high:,.4g} between runs (95 %), spread 10.00%"
    )


def test_one_run_has_no_spread_between_runs() -> None:
    with pytest.raises(ValueError, match="no spread"):
        repeats_line(list(runs(1.0, num_runs=1)))
