"""Every stage of every shipped recipe holds exactly the parameters that the closed form counts.

Real Megatron-Core builds one rank of the stage at the recipe's own size, on tensors without data and with the
torch-native kernels, to which the recipe's own are changed on both sides.
"""

import pytest

from moe_bench.analysis.params import rank_params
from moe_bench.analysis.tensors import chunk_tensors
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.derive_dryrun import dryrun_plan
from moe_bench.spec.load import Loader
from moe_bench.spec.pipeline import pipeline_chunks
from moe_bench.spec.recipe import Recipe
from tests.harness.meta_builds import built_chunks

LOADER = Loader(root=recipes_root())
PATHS = recipe_paths(LOADER.root)


def shipped() -> list[object]:
    """All recipes; two thirds of them are slow."""
    return [
        pytest.param(
            dryrun_plan(LOADER.recipe(path), modified=()).recipe,
            id=f"{path.parent.name}/{path.stem}",
            marks=() if index % 3 == 0 else pytest.mark.slow,
        )
        for index, path in enumerate(PATHS)
    ]


@pytest.mark.parametrize("recipe", shipped())
def test_megatron_core_builds_the_counted_parameters_on_every_stage(recipe: Recipe) -> None:
    chunks = pipeline_chunks(
        recipe.parallel, num_layers=recipe.model.num_layers, num_mtp_layers=recipe.num_mtp_layers
    )
    for stage in range(recipe.parallel.pipeline):
        built = built_chunks(recipe, stage)
        counted = rank_params(recipe, stage)
        experts = sum(
            tensor.num_elements for chunk in built for tensor in chunk if ".experts." in tensor.name
        )
        everything = sum(tensor.num_elements for chunk in built for tensor in chunk)
        assert (everything - experts, experts) == (counted.dense, counted.expert), f"stage {stage}"
        listed = [chunk_tensors(recipe, chunk) for chunk in chunks if chunk.pipeline_rank == stage]
        for there, here in zip(built, listed, strict=True):
            assert [(tensor.num_elements, tensor.num_columns, tensor.in_expert_group) for tensor in here] == [
                (tensor.num_elements, tensor.num_columns, tensor.in_expert_group) for tensor in there
            ]
            assert [tensor.is_expert for tensor in here] == [".experts." in tensor.name for tensor in there]
            assert all(mine.name in real.name for mine, real in zip(here, there, strict=True))
            if recipe.parallel.tensor > 1:
                assert [tensor.sums_over_tensor for tensor in here] == [
                    tensor.sums_over_tensor for tensor in there
                ]
