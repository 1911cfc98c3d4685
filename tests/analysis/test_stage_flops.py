"""What the stages of a pipeline compute, beside what the whole model does."""

from __future__ import annotations

import pytest

from moe_bench.analysis.flops import FlopsCounting, step_flops
from moe_bench.analysis.stage_flops import stage_flops
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

LOADER = Loader(root=recipes_root())
COUNTING = FlopsCounting.MCORE_WINDOWED


def recipe_of(name: str) -> Recipe:
    return LOADER.recipe(find_recipe(name, LOADER))


@pytest.mark.parametrize(
    "name",
    ["deepseek_v3/h100_sxm_1024g_fp8_blockwise", "qwen3_235b_a22b", "gpt_oss_120b", "qwen3_30b_a3b"],
)
def test_the_stages_of_a_pipeline_sum_to_the_step(name: str) -> None:
    recipe = recipe_of(name)
    stages = [stage_flops(recipe, rank, counting=COUNTING) for rank in range(recipe.parallel.pipeline)]
    assert sum(stages) == step_flops(recipe, counting=COUNTING)


def test_the_last_stage_of_qwen3_has_the_lm_head_beyond_its_layers() -> None:
    recipe = recipe_of("qwen3_235b_a22b")
    model = recipe.model
    tokens = recipe.global_batch_size * recipe.seq_len
    layers = [
        sum(len(chunk.layers) for chunk in recipe.chunks() if chunk.pipeline_rank == rank)
        for rank in range(recipe.parallel.pipeline)
    ]
    first, last = (stage_flops(recipe, rank, counting=COUNTING) for rank in (0, recipe.parallel.pipeline - 1))
    # 3 passes x 2 FLOPs x H x V per token
    head = 6 * tokens * model.hidden_size * model.vocab_size
    assert (last - head) * layers[0] == first * layers[-1]
