"""Megatron-Core builds exactly the parameters that the closed form counts, on every rank."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from moe_bench.analysis.params import rank_params
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.spec.load import Loader
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import smoke_plan
from tests.harness.param_counts import BuiltParams, count_built

LOADER = Loader(root=Path(__file__).resolve().parents[2] / "recipes")
MODELS = sorted(path.parent.name for path in LOADER.root.glob("*/model.yaml"))
TENSOR = {"tensor": 2, "sequence_parallel": True}

LAYOUTS: Mapping[str, tuple[str, dict[str, object]]] = {
    "latent attention over TP2, PP2 x VPP2 by layout string, EP2, MTP with the loss": (
        "deepseek_v3",
        {**TENSOR, "num_gpus": 4, "pipeline": 2, "virtual_pipeline": 2, "layout": "Et|tt|tt|mL", "expert": 2},
    ),
    "an even split over PP2 with MTP": ("glm_4_5_air", {**TENSOR, "num_gpus": 4, "pipeline": 2}),
    "biases and sinks over TP2, EP2": ("gpt_oss_20b", {**TENSOR, "num_gpus": 2, "expert": 2}),
    "query groups fewer than TP4": (
        "qwen3_30b_a3b",
        {"num_gpus": 4, "tensor": 4, "sequence_parallel": True, "expert": 4},
    ),
    "whole-vector norms over TP2": ("olmoe_1b_7b", {**TENSOR, "num_gpus": 2, "expert": 2}),
    "ETP2 under TP1": ("mixtral_8x7b", {"num_gpus": 2, "expert_tensor": 2}),
}


def tiny(key: str, layout: Mapping[str, object]) -> Recipe:
    """The smoke recipe of a model's default run, on another layout."""
    recipe = LOADER.recipe(LOADER.root / key / f"{LOADER.model(key).default_run}.yaml")
    toy = smoke_plan(recipe, host=LOADER.system("cpu_host"), modified=()).recipe
    parallel = ParallelSpec.model_validate(dict(layout))
    fields = {
        "parallel": parallel,
        "model": toy.model.model_copy(update={"num_layers": 5 if parallel.layout else 4}),
        "num_mtp_layers": toy.model.num_mtp_layers,
        "global_batch_size": 4 * parallel.data * toy.micro_batch_size,
    }
    return toy.model_copy(update=fields)


def with_tied_embeddings(recipe: Recipe) -> Recipe:
    model: ModelSpec = recipe.model.model_copy(update={"tied_embeddings": True})
    return recipe.model_copy(update={"model": model})


CASES: Mapping[str, Recipe] = {
    **{f"{key} on one rank": tiny(key, {"num_gpus": 1}) for key in MODELS},
    **{name: tiny(key, layout) for name, (key, layout) in LAYOUTS.items()},
    "tied embeddings on one rank": with_tied_embeddings(tiny("olmoe_1b_7b", {"num_gpus": 1})),
    "tied embeddings over PP2": with_tied_embeddings(tiny("olmoe_1b_7b", {"num_gpus": 2, "pipeline": 2})),
}


@pytest.fixture(scope="module")
def built() -> dict[str, list[BuiltParams]]:
    """Parameters on every rank of every case; building them takes one import of Megatron-Core."""
    counts = count_built([megatron_arguments(recipe) for recipe in CASES.values()])
    return dict(zip(CASES, counts, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_the_counted_parameters(built: dict[str, list[BuiltParams]], case: str) -> None:
    recipe = CASES[case]
    ranks = built[case]
    assert len(ranks) == recipe.parallel.num_gpus
    for rank in ranks:
        counted = rank_params(recipe, rank.pipeline_rank)
        assert (rank.dense, rank.expert) == (counted.dense, counted.expert)
