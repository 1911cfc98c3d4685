"""What training on a stated number of tokens takes: time, GPU-hours, energy at most, and money."""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.projection.step import Projection
from moe_bench.spec.recipe import Recipe

_S_PER_HOUR = 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingCost:
    """A whole training at the projected speed, without restarts, checkpoints and evaluation."""

    num_gpus: int
    num_tokens: int
    time_s: float
    gpu_hours: float
    max_energy_j: float
    """Every GPU at its datasheet's maximum power all the time: an upper bound, without hosts and cooling."""

    def price(self, *, per_gpu_hour: float) -> float:
        """GPU-hours x p, in the currency of the stated price."""
        return self.gpu_hours * per_gpu_hour


def training_cost(projection: Projection, *, num_tokens: int) -> TrainingCost:
    """t = D / (tokens/s/GPU x N), GPU-hours = N t / 3600, E <= N P_max t."""
    num_gpus = projection.recipe.parallel.num_gpus
    time_s = num_tokens / (projection.tokens_per_s_per_gpu * num_gpus)
    gpu_hours = num_gpus * time_s / _S_PER_HOUR
    return TrainingCost(
        num_gpus=num_gpus,
        num_tokens=num_tokens,
        time_s=time_s,
        gpu_hours=gpu_hours,
        max_energy_j=num_gpus * max_power_w(projection.recipe) * time_s,
    )


def max_power_w(recipe: Recipe) -> float:
    """The datasheet's maximum of one GPU; a projected recipe has one."""
    assert recipe.system.gpu is not None  # noqa: S101 - `project` refuses a system without GPUs
    return recipe.system.gpu.max_power_w
