"""Small recipes for dry runs: a model's structure at toy widths, for GPUs, over any layout."""

from __future__ import annotations

from typing import Any

from moe_bench.harness.dryrun.one_rank import dry_run_rank
from moe_bench.harness.dryrun.outcome import RankDryRun
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.derive_dryrun import dryrun_plan
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import CudaGraphs, Fusions, Offload, Overlap, Recipe, Recompute
from moe_bench.spec.scale import smoke_plan
from tests.harness.toys import ONE_PROCESS

LOADER = Loader(root=recipes_root())
SEQ_LEN = 64
NUM_LAYERS = 4

FUSED = Fusions(permute=True, router=True, rope=True, activation=True, cross_entropy="te")


def toy(
    model: str,
    *,
    parallel: dict[str, Any] | None = None,
    num_layers: int = NUM_LAYERS,
    num_micro_batches: int = 4,
    **changes: Any,
) -> Recipe:
    """What a dry run builds from four toy layers of `model` on one rank, or on the given layout."""
    asked = LOADER.recipe(find_recipe(model, LOADER))
    small = smoke_plan(asked, host=LOADER.system("cpu_host"), modified=()).recipe
    laid = asked.parallel.model_copy(update=ONE_PROCESS | (parallel or {}))
    update: dict[str, Any] = {
        "model": small.model.model_copy(update={"num_layers": num_layers}),
        "seq_len": SEQ_LEN,
        "micro_batch_size": 1,
        "global_batch_size": num_micro_batches * laid.data,
        "num_mtp_layers": 0,
        "parallel": laid,
        "recompute": Recompute(),
        "overlap": Overlap(),
        "token_drop": None,
        "kernels": asked.kernels.model_copy(update={"fusions": FUSED}),
        "dispatch": asked.dispatch.model_copy(update={"dispatcher": "alltoall", "num_sms": None}),
        "cuda_graphs": CudaGraphs(),
        "offload": Offload(),
        "low_precision": None,
        "precision": "bf16",
        "env": {},
        "mcore": {},
    }
    recipe = asked.model_copy(update=update | changes)
    # what a launcher would have to set is of no matter here
    assert [problem for problem in legality_problems(recipe) if problem.path[0] != "env"] == []
    return dryrun_plan(recipe, modified=()).recipe


def first_rank(recipe: Recipe, pipeline_rank: int, **options: Any) -> RankDryRun:
    """The dry run of the first rank of a pipeline stage."""
    ranks_per_stage = recipe.parallel.num_gpus // recipe.parallel.pipeline
    return dry_run_rank(recipe, pipeline_rank * ranks_per_stage, **options)
