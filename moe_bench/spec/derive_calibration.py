"""Toys that a calibration works on: a model's structure at widths that take no time, on one process."""

from __future__ import annotations

from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import Overlap, Recipe, Recompute, Steps
from moe_bench.spec.scale import smoke_plan
from moe_bench.spec.system import SystemSpec

LAUNCHING_MODEL = "qwen3_30b_a3b"
"""Whose layers are launched: grouped-query attention and experts, and nothing that others lack."""


def calibration_toy(recipe: Recipe, *, host: SystemSpec) -> Recipe:
    """`recipe` at smoke scale, so that its shapes are toys, with BF16 products."""
    return smoke_plan(recipe, host=host, modified=()).recipe.model_copy(update={"precision": "bf16"})


def launching_toy(recipe: Recipe, *, num_layers: int, host: SystemSpec, system: SystemSpec) -> Recipe:
    """The toy of `recipe` with `num_layers` layers on one GPU of `system`, or on a CPU where it has none.

    Nothing is computed twice or overlapped: what is timed is the host that starts kernels.
    """
    toy = calibration_toy(recipe, host=host)
    return toy.model_copy(
        update={
            "system": system,
            "model": toy.model.model_copy(update={"num_layers": num_layers}),
            "precision": "bf16" if system.gpu is not None else "fp32",
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "num_mtp_layers": 0,
            "parallel": ParallelSpec(num_gpus=1),
            "recompute": Recompute(),
            "overlap": Overlap(),
            "steps": Steps(num_warmup=1, num_timed=1),
        }
    )
