"""What a record says, reduced: step time and interval, throughput, FLOPs rate, MFU, memory, loss, load."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from moe_bench.analysis.flops import step_flops
from moe_bench.analysis.stage_flops import stage_flops
from moe_bench.analysis.stats import median_interval, outliers, steady_state
from moe_bench.results.flops_convention import OUR_COUNTING
from moe_bench.results.record import Record

COUNTING = OUR_COUNTING


@dataclass(frozen=True, slots=True, kw_only=True)
class RunMetrics:
    """The numbers that tables show; a rate that cannot exist is None, never zero."""

    step_time_s: float
    """Median over the steady steps of the slowest rank's time."""
    step_time_low_s: float
    step_time_high_s: float
    """Ends of the 95 % bootstrap interval of the median."""
    first_steady_step: int
    """First timed step, from 0, that the numbers are taken from."""
    has_settled: bool | None
    """None where there are too few steps to tell; all of them count then, and where they have not settled."""
    outlier_steps: tuple[int, ...]
    """Timed steps far from the median; they count like all others from `first_steady_step` on."""
    tokens_per_s: float
    tokens_per_s_per_gpu: float
    """Per process where there is no GPU."""
    flops_per_s_per_gpu: float
    mfu_fraction: float | None
    """Of the GPU's BF16 peak; None where the system has no peak."""
    peak_memory_bytes: int
    """Of the rank that used most."""
    peak_memory_rank: int
    first_loss: float | None
    last_loss: float | None
    """None of a slice without the last pipeline stage."""
    slowest_rank: int
    slowest_host: str
    energy_per_token_j: float | None
    """Of all GPUs over the timed steps; None where they do not count it."""


def run_metrics(record: Record) -> RunMetrics:
    """Reduce one record.

    tokens/s = sequences x length / median step time. FLOPs/s per GPU = step FLOPs / (GPUs x step time),
    counted as COUNTING says. MFU = that over the GPU's dense BF16 peak (arXiv:2204.02311, appendix B), for
    FP8 runs too: one denominator keeps them comparable, though several publishers divide by the FP8 peak.

    Of a slice one rank ran: FLOPs are those of its pipeline stage over the ranks of that stage, and tokens
    the step's over all ranks, as if every stage took as long.
    """
    recipe, samples = record.plan.recipe, record.samples
    times_s = record.slowest_step_times_s()
    steady = steady_state(times_s)
    interval = median_interval(times_s[steady.first_step :])
    tokens_per_s = record.tokens_per_step / interval.median_s
    flops_per_s_per_gpu = rank_step_flops(record) / interval.median_s
    gpu = recipe.system.gpu
    peak_memory_bytes = max(samples.peak_memory_bytes)
    slowest_rank = record.slowest_rank()
    return RunMetrics(
        step_time_s=interval.median_s,
        step_time_low_s=interval.low_s,
        step_time_high_s=interval.high_s,
        first_steady_step=steady.first_step,
        has_settled=steady.has_settled,
        outlier_steps=tuple(step for step, is_far in enumerate(outliers(times_s)) if is_far),
        tokens_per_s=tokens_per_s,
        tokens_per_s_per_gpu=tokens_per_s / record.num_ranks,
        flops_per_s_per_gpu=flops_per_s_per_gpu,
        mfu_fraction=None if gpu is None else flops_per_s_per_gpu / gpu.bf16_flops_per_s,
        peak_memory_bytes=peak_memory_bytes,
        peak_memory_rank=samples.peak_memory_bytes.index(peak_memory_bytes),
        first_loss=samples.losses[0] if record.has_loss else None,
        last_loss=samples.losses[-1] if record.has_loss else None,
        slowest_rank=slowest_rank,
        slowest_host=record.provenance.hosts[slowest_rank],
        energy_per_token_j=None
        if samples.energy_j is None
        else sum(samples.energy_j) / (record.tokens_per_step * len(samples.step_times_s[0])),
    )


def rank_step_flops(record: Record) -> float:
    """FLOPs of one optimizer step on one GPU, counted as COUNTING says."""
    plan, recipe = record.plan, record.plan.recipe
    if not plan.is_slice:
        return step_flops(recipe, counting=COUNTING) / record.num_ranks
    num_sharing = recipe.parallel.num_gpus // recipe.parallel.pipeline
    return stage_flops(recipe, plan.pipeline_rank, counting=COUNTING) / num_sharing


def gpu_s_per_token(record: Record) -> tuple[float, ...]:
    """GPU-seconds per token of each steady step: the inverse of tokens/s/GPU, by the slowest rank's time."""
    times_s = record.slowest_step_times_s()
    scale = record.num_ranks / record.tokens_per_step
    return tuple(time_s * scale for time_s in times_s[steady_state(times_s).first_step :])


def mean_tokens_per_s_per_gpu(runs_s: Sequence[Sequence[float]]) -> float:
    """Throughput of several runs, each given in GPU-seconds per token: geometric mean of their medians.

    Geometric, so that ratios to it are the means that `analysis.equivalence` takes of logarithms.
    """
    return 1 / statistics.geometric_mean([statistics.median(times_s) for times_s in runs_s])


def max_over_mean_load_ratio(record: Record) -> float | None:
    """Tokens of the busiest expert over the mean, the worst layer and step; None without experts."""
    ratios = [
        ratio for step in record.samples.tokens_per_expert if (ratio := step_load_ratio(step)) is not None
    ]
    return max(ratios, default=None)


def step_load_ratio(layers: Sequence[Sequence[int]]) -> float | None:
    """The same of one step, `layers[layer][expert]` being tokens; None where no token was routed."""
    ratios = [max(layer) * len(layer) / sum(layer) for layer in layers if sum(layer) > 0]
    return max(ratios, default=None)
