"""Peak memory of shipped recipes: the closed form beside a dry run of Megatron-Core, in the form it builds.

Within 2 % of the total and 5 % of what is not states. By default one stage of each structure that memory
depends on; every stage of every recipe with `-m "slow or not slow"`.
"""

import pytest

from moe_bench.analysis.memory import rank_memory
from moe_bench.harness.dryrun.one_rank import dry_run_rank
from moe_bench.report.dryrun_view import state_bytes
from moe_bench.spec.catalogue import recipe_paths, recipes_root
from moe_bench.spec.derive_dryrun import dryrun_plan, ranks_to_run
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

LOADER = Loader(root=recipes_root())
STRUCTURES = {
    "deepseek_v3/h100_sxm_1024g_bf16": 7,  # loss and MTP under TP2, interleaved
    "deepseek_v3/h100_sxm_256g_bf16": 2,  # everything recomputed, eight chunks
    "deepseek_v3/h100_sxm_1024g_fp8_blockwise": 3,  # expert parallelism overlapped, shared experts
    "deepseek_v3/h100_sxm_256g_fp8_blockwise_offload": 4,  # experts and up-projections recomputed
    "glm_4_5_air/h100_sxm_64g_bf16": 1,  # 1F1B, in the middle
    "gpt_oss_120b/h100_sxm_64g_bf16": 0,  # biases of experts, sinks, windows
    "gpt_oss_20b/h100_sxm_8g_bf16": 0,  # everything recomputed, two sequences, large vocabulary
    "kimi_k2/h100_sxm_256g_bf16": 7,  # the last of eight ranks
    "mixtral_8x22b/h100_sxm_128g_bf16": 3,  # one local expert, Megatron-Core's loss
    "mixtral_8x22b/h100_sxm_128g_bf16_fsdp": 0,
    "moonlight_16b_a3b/h100_sxm_8g_bf16_gbs4": 0,  # rotation not fused, queries not compressed
    "olmoe_1b_7b/h100_sxm_8g_bf16": 0,  # norms over all heads, z-loss
    "olmoe_1b_7b/h100_sxm_8g_bf16_quack": 0,  # nothing permuted
    "pr_moe_350m/h100_sxm_8g_bf16": 0,  # LayerNorm, GELU, positions, residual experts weighed
    "qwen3_235b_a22b/h100_sxm_256g_bf16_seq128k": 4,  # CP8
    "qwen3_30b_a3b/h100_sxm_16g_bf16_alltoall": 0,  # permutation not fused
    "qwen3_30b_a3b/h100_sxm_8g_bf16_quack": 0,  # gathered where they arrived
    "qwen3_30b_a3b/h100_sxm_16g_fp8_tensorwise_pp2": 0,  # overlap with one layer per chunk
}


def stages() -> list[object]:
    """Every stage of every recipe; slow, but for one of each structure."""
    found = []
    for path in recipe_paths(LOADER.root):
        recipe = LOADER.recipe(path)
        derived = dryrun_plan(recipe, modified=()).recipe
        for stage in range(recipe.parallel.pipeline):
            is_one = STRUCTURES.get(recipe.name) == stage
            marks = () if is_one else pytest.mark.slow
            found.append(pytest.param(derived, stage, id=f"{recipe.name}-{stage}", marks=marks))
    return found


@pytest.mark.parametrize(("recipe", "stage"), stages())
def test_the_closed_form_of_peak_memory_agrees_with_the_dry_run(recipe: Recipe, stage: int) -> None:
    run = dry_run_rank(recipe, ranks_to_run(recipe, rank=None, all_stages=True)[stage])
    closed, states = rank_memory(recipe, stage), state_bytes(run)
    assert closed.states_bytes == pytest.approx(states, rel=1e-3)
    assert closed.total_bytes == pytest.approx(run.peak.num_bytes, rel=0.02)
    assert closed.total_bytes - closed.states_bytes == pytest.approx(run.peak.num_bytes - states, rel=0.05)


def test_the_named_structures_are_stages_of_shipped_recipes() -> None:
    pipelines = {
        recipe.name: recipe.parallel.pipeline for recipe in map(LOADER.recipe, recipe_paths(LOADER.root))
    }
    assert all(stage < pipelines[name] for name, stage in STRUCTURES.items())
