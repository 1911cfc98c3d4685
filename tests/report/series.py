"""Made-up runs of known speed and scatter."""

import math
import random
from collections.abc import Iterator

from moe_bench.results.record import Record
from moe_bench.spec.scale import Plan
from tests.results.records import full, record


def runs(
    step_s: float,
    *,
    num_runs: int = 3,
    spread: float = 0.002,
    num_steps: int = 20,
    noise: float = 0.001,
    plan: Plan | None = None,
    seed: int = 7,
    commit: str = "0123456789abcdef",
    dispatcher: str = "MoEAlltoAllTokenDispatcher",
) -> Iterator[Record]:
    """`num_runs` records whose medians scatter by `spread` around `step_s`, on the 8 ranks of the recipe."""
    generator = random.Random(seed)
    for repeat in range(num_runs):
        level_s = step_s * math.exp(generator.gauss(0, spread))
        steps_s = tuple(level_s * generator.gauss(1, noise) for _ in range(num_steps))
        yield record(
            plan or full(),
            step_times_s=(steps_s,) * 8,
            started_at=f"2026-11-22T{seed % 24:02}:{repeat:02}:00+00:00",
            job_id=f"job{seed}",
            repeat=repeat,
            commit=commit,
            dispatcher=dispatcher,
        )
