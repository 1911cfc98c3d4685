"""Toy recipes for the harness tests: a model's own structure at smoke scale, in FP32 and on one process."""

from __future__ import annotations

from typing import Any

from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import OptimizerSpec, Overlap, Recipe, Recompute, Routing, Steps
from moe_bench.spec.scale import smoke_plan

ONE_PROCESS = {
    "num_gpus": 1,
    "tensor": 1,
    "pipeline": 1,
    "virtual_pipeline": 1,
    "context": 1,
    "expert": 1,
    "expert_tensor": 1,
    "layout": None,
    "sequence_parallel": False,
    "embedding_counts_as_layer": False,
    "loss_counts_as_layer": False,
    "data_sharding": "distributed_optimizer",
}


def smoke_recipe(model: str) -> Recipe:
    """What `run MODEL --scale smoke` trains."""
    loader = Loader(root=recipes_root())
    asked = loader.recipe(find_recipe(model, loader))
    return smoke_plan(asked, host=loader.system("cpu_host"), modified=()).recipe


def parity_recipe(model: str) -> Recipe:
    """Four layers of the model's structure, with its MTP module, on one process: six steps, natural routing.

    Weights are wide and the learning rate is high, so that a wrong gradient shows in the next loss.
    """
    smoke = smoke_recipe(model)
    return smoke.model_copy(
        update={
            "model": smoke.model.model_copy(update={"num_layers": 4, "vocab_size": 256, "init_std": 0.05}),
            "precision": "fp32",
            "seq_len": 32,
            "micro_batch_size": 1,
            "global_batch_size": 8,
            "num_mtp_layers": smoke.model.num_mtp_layers,
            "parallel": smoke.parallel.model_copy(update=ONE_PROCESS),
            "routing": Routing(mode="natural"),
            "token_drop": None,
            "recompute": Recompute(),
            "overlap": Overlap(),
            "optimizer": OptimizerSpec(learning_rate=1e-3),
            "steps": Steps(num_warmup=1, num_timed=5),
        }
    )


def laid_out(recipe: Recipe, *, parallel: dict[str, Any], **changes: Any) -> Recipe:
    """`recipe` over several processes, checked for being a legal one."""
    changed = recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update=parallel), **changes})
    assert list(legality_problems(changed)) == []
    return changed
