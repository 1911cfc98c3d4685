"""Each correction by hand, and none where the recipe is what the dry run builds."""

from __future__ import annotations

from moe_bench.analysis.dispatch_buffers import dispatch_buffer_bytes
from moe_bench.analysis.memory import rank_memory
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
    # EP64 with 20 SMs: 288 slots for each of 8 peers, 140 for each of 8 nodes, both ways; see analysis
    assert found["dispatch: buffers of deepep"].num_bytes == dispatch_buffer_bytes(
        recipe_of("deepseek_v3/h100_sxm_256g_fp8_blockwise_offload")
    )


def test_weight_gradients_added_in_the_gemm_leave_a_placeholder_per_shape() -> None:
    recipe = recipe_of("qwen3_30b_a3b/h100_sxm_16g_bf16")
    assert recipe.kernels.fusions.gradient_accumulation
    # queries, keys and values; output; both halves of an expert's first projection; its second one; the head
    elements = 2048 * (32 + 2 * 4) * 128 + 32 * 128 * 2048 + 2 * 768 * 2048 + 768 * 2048 + 151_936 * 2048
    found = terms_of(recipe)["weight gradients: added up in the GEMM, a placeholder per shape"]
    # the fullest moment is the loss, where no weight gradient is in flight
    assert found.num_bytes == 2 * elements


def test_what_nobody_has_a_figure_for_is_said() -> None:
    found = terms_of(recipe_of("deepseek_v3/gb300_nvl72_256g_mxfp8"))
    assert [term.term for term in found.values() if term.num_bytes is None] == [
        "CUDA graphs: their memory pools",
        "offloaded activations",
    ]


def test_padded_attention_is_counted_per_layer_and_micro_batch_in_flight() -> None:
    recipe = recipe_of("moonlight_16b_a3b/h100_sxm_8g_bf16_gbs4")
    attention = recipe.model.attention
    assert attention.kind == "mla"
    assert (attention.qk_nope_head_dim, attention.qk_rope_head_dim, attention.v_head_dim) == (128, 64, 128)
    # 4,096 tokens, 16 heads over TP2, 27 layers, one micro batch: 192 + 192 - 128 channels of two bytes
    per_layer = 4096 * 8 * (2 * 192 - 128) * 2
    # norms are modules of their own in either family, but for the first layer's dense MLP
    term = terms_of(recipe)["kernels: norms fused into projections, MLA's values unpadded"]
    assert term.num_bytes == -27 * per_layer


def test_the_terms_add_up_to_the_closed_form_of_the_recipe_asked_for() -> None:
    recipe = recipe_of("deepseek_v3/h100_sxm_1024g_fp8_blockwise")
    built = dryrun_plan(recipe, modified=()).recipe
    found = terms_of(recipe, 3)
    buffers = found["dispatch: buffers of deepep"].num_bytes or 0
    total = sum(term.num_bytes or 0 for term in found.values()) - buffers
    asked, derived = (rank_memory(one, 3) for one in (recipe, built))
    assert total == asked.total_bytes - derived.total_bytes - (
        asked.gradients_bytes - derived.gradients_bytes
    )
