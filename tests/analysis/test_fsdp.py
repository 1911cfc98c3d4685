"""Megatron-FSDP's buffers by hand: what is never divided, what padding adds, what a shard holds."""

from __future__ import annotations

import pytest

from moe_bench.analysis.fsdp import row_grain, sharded_buffers
from moe_bench.analysis.params import rank_params
from moe_bench.analysis.tensors import Tensor
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import pipeline_chunks
from moe_bench.spec.recipe import Recipe
from tests.analysis.conftest import RecipeMaker


def matrices(*shapes: tuple[int, int]) -> list[Tensor]:
    """Tensors of [rows, columns], the widest first."""
    ordered = sorted(shapes, key=lambda shape: shape[1], reverse=True)
    return [Tensor(name="weight", num_elements=rows * cols, num_columns=cols) for rows, cols in ordered]


@pytest.mark.parametrize(
    ("shapes", "grain"),
    [
        ([(10, 8)], 8),
        ([(10, 8), (4, 4)], 8),  # two rows of 4 are a row of 8, and 16 elements two of them
        ([(10, 8), (3, 4)], 8),  # 12 elements are no whole number of 8
        ([(10, 8), (10, 6)], 24),
        ([(10, 8), (1, 6)], 8),  # smaller than a row of 8
        ([(10, 8), (20, 1)], 8),
    ],
)
def test_a_grain_is_a_whole_number_of_rows_of_every_matrix(shapes: list[tuple[int, int]], grain: int) -> None:
    assert row_grain(matrices(*shapes)) == grain


def fsdp(models: dict[str, ModelSpec], make_recipe: RecipeMaker, name: str, **layout: object) -> Recipe:
    parallel = ParallelSpec.model_validate({"data_sharding": "megatron_fsdp", **layout})
    return make_recipe(models[name], parallel)


def test_experts_are_padded_to_rows_and_not_to_experts(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    """One expert of Mixtral over 3 ranks: 3 x 4,096 x 14,336 elements, 2,048 grains of 28,672 for each."""
    recipe = fsdp(models, make_recipe, "mixtral_8x7b", num_gpus=24, expert=8)
    (chunk,) = pipeline_chunks(recipe.parallel, num_layers=32, num_mtp_layers=0)
    experts = [buffer for buffer in sharded_buffers(recipe, chunk) if buffer.is_expert]
    assert len(experts) == 32
    assert {buffer.num_elements for buffer in experts} == {3 * 4096 * 14_336}
    assert {buffer.shard_elements for buffer in experts} == {2048 * 28_672}


def test_every_element_is_in_one_shard(models: dict[str, ModelSpec], make_recipe: RecipeMaker) -> None:
    recipe = fsdp(models, make_recipe, "gpt_oss_20b", num_gpus=24, expert=8)
    (chunk,) = pipeline_chunks(recipe.parallel, num_layers=24, num_mtp_layers=0)
    held = [0, 0]
    for buffer in sharded_buffers(recipe, chunk):
        for shard in range(buffer.num_shards):
            held[buffer.is_expert] += sum(length for _, length in buffer.in_shard(shard))
    params = rank_params(recipe, 0)
    assert held == [params.dense, params.expert]
