"""Loads of ranks at the start of a training run, before its router has learned to spread tokens.

With random weights the tokens of a text grow alike from layer to layer, until all of them choose the same
experts: in a Qwen3-30B-A3B the busiest expert takes 7 times the mean in the first layer, 13 times in the
second and 15 to 16 times in all others, where 16 is every token (benchmarks/untrained_routing.py, on a CPU).
Which experts these are is random, layer by layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moe_bench.spec.model import MixtureOfExperts
from moe_bench.spec.recipe import Recipe

_QUANTILE = 0.99
_NUM_ROUTERS = 2000
_SEED = 20_250_101


@dataclass(frozen=True, slots=True, kw_only=True)
class UntrainedLoads:
    """What the busiest rank receives for its experts over the mean of ranks; 1 is balanced."""

    stage_ratio: float
    """Mean over the expert layers of one pipeline rank."""
    layer_ratio: float
    """In one layer."""


def untrained_loads(recipe: Recipe, moe: MixtureOfExperts) -> UntrainedLoads:
    """99th percentiles over routers, of the busiest of EP x PP ranks.

    In each layer the top k of E experts take every token; a rank with j of them receives j EP / k times the
    mean. Layers are independent and equal in number on every pipeline rank.
    """
    ranks, stages = recipe.parallel.expert, recipe.parallel.pipeline
    num_layers = max(1, sum(map(recipe.model.is_moe_layer, range(recipe.model.num_layers))) // stages)
    per_rank = [moe.num_experts // ranks] * ranks
    draw = np.random.default_rng(_SEED).multivariate_hypergeometric
    chosen = draw(per_rank, moe.top_k, size=(_NUM_ROUTERS, stages, num_layers))
    loads = chosen * ranks / moe.top_k
    busiest = loads.mean(axis=2).max(axis=(1, 2)), loads.max(axis=(1, 2, 3))
    stage, layer = (float(np.quantile(one, _QUANTILE)) for one in busiest)
    return UntrainedLoads(stage_ratio=stage, layer_ratio=layer)
