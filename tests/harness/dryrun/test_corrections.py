"""Each correction by hand, and none where the recipe is what the dry run builds."""

from __future__ import annotations

from moe_bench.harness.dryrun.corrections import corrections
from moe_bench.harness.dryrun.outcome import Correction
from moe_bench.spec.catalogue import find_recipe
from moe_bench.spec.derive_dryrun import dryrun_plan
from moe_bench.spec.recipe import Recipe
from tests.harness.dryrun.conftest import LOADER, toy


def terms_of(recipe: Recipe, pipeline_rank: int = 0) -> dict[str, Correction]:
    built = dryrun_plan(recipe, modified=()).recipe
    return {term.term: term for term in corrections(recipe, built, pipeline_rank)}


def recipe_of(name: str) -> Recipe:
    return LOADER.recipe(find_recipe(name, LOADER))


def test_what_is_built_as_asked_needs_no_correction() -> None:
    assert terms_of(toy("qwen3_30b_a3b")) == {}


def test_no_correction_claims_to_be_verified() -> None:
    found = terms_of(recipe_of("deepseek_v3/h100_sxm_1024g_fp8_blockwise"))
    assert found
    assert not any(term.is_verified for term in found.values())


def test_fp8_keeps_two_copies_of_the_weights_and_offloading_takes_the_states_away() -> None:
    found = terms_of(recipe_of("deepseek_v3/h100_sxm_256g_fp8_blockwise_offload"))
    assert (found["weights: quantized copies"].num_bytes or 0) > 0
    assert (found["optimizer states: other types, or on the host"].num_bytes or 0) < 0
    assert found["dispatch: buffers of deepep"].num_bytes is None


def test_padded_attention_is_counted_per_layer_and_micro_batch_in_flight() -> None:
    recipe = recipe_of("moonlight_16b_a3b/h100_sxm_8g_bf16_gbs4")
    attention = recipe.model.attention
    assert attention.kind == "mla"
    assert (attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim) == (128, 64, 128)
    # 4,096 tokens, 16 heads over TP2, 27 layers, one micro batch: 192 + 192 - 128 channels of two bytes
    per_layer = 4096 * 8 * (2 * 192 - 128) * 2
    term = terms_of(recipe)["attention: values and output padded for torch's flash kernel"]
    assert term.num_bytes == -27 * per_layer
