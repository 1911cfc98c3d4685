"""How fast the search is, part by part: layouts judged, bounded and projected per second of one core.

python benchmarks/search_speed.py [--model deepseek_v3] [--system h100_sxm] [--num-gpus 256]
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections.abc import Callable, Sequence
from itertools import groupby

from moe_bench.analysis.memory import memory_fit
from moe_bench.projection.constants import Constants
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.search.base import Asked, search_base
from moe_bench.projection.search.bound import StepBound
from moe_bench.projection.search.layout import Axis
from moe_bench.projection.search.legality import Legality
from moe_bench.projection.search.memory import MemoryBound
from moe_bench.projection.search.search import search
from moe_bench.projection.search.space import Space, search_space
from moe_bench.projection.step import project
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader

_NUM_PROJECTED = 100
_NUM_ASKED = 2000
_SEED = 1

Families = Sequence[tuple[tuple[int, ...], tuple[int, ...]]]


def main() -> None:
    """Print a line per part."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="deepseek_v3")
    parser.add_argument("--system", default="h100_sxm")
    parser.add_argument("--num-gpus", type=int, default=256)
    arguments = parser.parse_args()
    os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
    asked = Asked(model=arguments.model, system=arguments.system, num_gpus=arguments.num_gpus)
    space = search_space(search_base(asked, Loader(root=recipes_root())).recipe)
    families = _line("judged legal or not", lambda: list(Legality(space).legal_families()), space.num_layouts)
    num_legal = sum(len(splits) for _, splits in families)
    _line("bounds prepared", lambda: (StepBound(space, Constants()), MemoryBound(space)), len(space.splits))
    _line("legal, pruned by both bounds", lambda: _bounds(space, families), num_legal)
    sample = _sample(families, _NUM_ASKED)
    _line(
        "asked of the rules one by one",
        lambda: [legality_problems(space.recipe(one)) for one in sample],
        len(sample),
    )
    sample = sample[:_NUM_PROJECTED]
    efficiency = Efficiency(space.base.system)
    _line("memory in full", lambda: [memory_fit(space.recipe(one)) for one in sample], len(sample))
    _line(
        "projected in full",
        lambda: [project(space.recipe(one), efficiency=efficiency) for one in sample],
        len(sample),
    )
    result = _line("generated, whole search", lambda: search(space, num_wanted=10), space.num_layouts)
    print(f"{result.num_legal:,} legal, {result.num_simulated:,} simulated")


def _line[Made](what: str, make: Callable[[], Made], number: int) -> Made:
    start_s = time.process_time()
    made = make()
    took_s = time.process_time() - start_s
    print(f"{what:32} {number:>10,} in {took_s:7.2f} s {number / took_s:>12,.0f} per second")
    return made


def _bounds(space: Space, families: Families) -> None:
    step, memory = StepBound(space, Constants()), MemoryBound(space)
    for _, group in groupby(families, key=lambda found: found[0][: Axis.EXPERT]):
        found = list(group)
        members = [family for family, _ in found]
        splits = sorted({split for _, legal in found for split in legal})
        step.of_group(members, splits)
        memory.of_group(members, splits)


def _sample(families: Families, number: int) -> list[tuple[int, ...]]:
    draw = random.Random(_SEED)
    return [(*family, draw.choice(splits)) for family, splits in draw.choices(families, k=number)]


if __name__ == "__main__":
    main()
