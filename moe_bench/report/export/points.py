"""A record as the curves that experiment trackers draw: one value per step and tag."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import accumulate

from moe_bench.analysis.stats import slowest_ranks
from moe_bench.report.figures import GIB, TERA
from moe_bench.results.metrics import rank_step_flops, step_load_ratio
from moe_bench.results.record import Record


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One value of one curve."""

    tag: str
    """`loss`, `step_time_s` and so on, with the unit in the name; `warmup/...` before the timed steps."""
    step: int
    """Optimizer step from 0, warm-up included."""
    time_s: float
    """Unix time: start of the run plus the steps up to this one, without what came before the first."""
    value: float


def points(record: Record) -> Iterator[Point]:
    """Every curve of `record`: by step, and what is one number per run at its last step."""
    samples = record.samples
    warmup_s = tuple(step.step_time_s for step in slowest_ranks(samples.warmup_step_times_s))
    timed_s = record.slowest_step_times_s()
    started_s = datetime.fromisoformat(record.provenance.started_at).timestamp()
    ends_s = [started_s + passed_s for passed_s in accumulate((*warmup_s, *timed_s))]

    def curve(tag: str, values: tuple[float | None, ...], *, first: int = 0) -> Iterator[Point]:
        for step, value in enumerate(values, start=first):
            if value is not None:
                yield Point(tag=tag, step=step, time_s=ends_s[step], value=value)

    first, last = len(warmup_s), len(warmup_s) + len(timed_s) - 1
    tflops = rank_step_flops(record) / TERA
    yield from curve("loss", samples.losses)
    yield from curve("grad_norm", samples.grad_norms)
    yield from curve("warmup/step_time_s", warmup_s)
    yield from curve("step_time_s", timed_s, first=first)
    tokens = record.tokens_per_step / record.num_ranks
    yield from curve("tokens_per_s_per_gpu", tuple(tokens / time_s for time_s in timed_s), first=first)
    yield from curve("tflops_per_gpu", tuple(tflops / time_s for time_s in timed_s), first=first)
    loads = tuple(step_load_ratio(step) for step in samples.tokens_per_expert)
    yield from curve("max_over_mean_load_ratio", loads, first=first)
    yield from curve("peak_memory_gib", (max(samples.peak_memory_bytes) / GIB,), first=last)
