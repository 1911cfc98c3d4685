"""Saved activations per layer by hand, what recomputation frees, and how many micro batches are in flight."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.analysis.activations import (
    chunk_activation_bytes,
    expert_token_copies,
    kept_bytes,
    layer_tensors,
    peak_in_flight_bytes,
    token_counts,
)
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import Chunk
from moe_bench.spec.recipe import KernelSpec, Recipe, Recompute, TokenDrop
from tests.analysis.conftest import RecipeMaker

ONE_NODE = ParallelSpec(num_gpus=8)
FULL = Recompute(granularity="full", method="uniform", num_layers=1)


def middle_chunk(*layers: int) -> Chunk:
    return Chunk(
        pipeline_rank=1,
        virtual_stage=0,
        layers=layers,
        has_embedding=False,
        has_loss=False,
        num_mtp_layers=0,
    )


def bytes_by_name(recipe: Recipe, *, is_moe: bool) -> dict[str, int]:
    return {tensor.name: tensor.saved_bytes for tensor in layer_tensors(recipe, is_moe=is_moe)}


def test_a_deepseek_expert_layer_matches_a_hand_count(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(models["deepseek_v3"], ONE_NODE)
    per_token = {name: saved // 4096 for name, saved in bytes_by_name(recipe, is_moe=True).items() if saved}
    assert per_token == {
        "attention_input": 2 * 7168,
        "attention_norm_output": 2 * 7168,
        "latents": 2 * (2 * (1536 + 512) + 64),
        "queries_keys_values": 2 * 128 * (2 * 192 + 128),
        "attention_output": 2 * 128 * 128,
        "attention_statistics": 4 * 128,
        "experts_input": 2 * 7168,
        "experts_norm_output": 2 * 7168,
        "router_scores": 4 * 256,
        "dispatched_tokens": 2 * 8 * 7168,
        "expert_gate_up": 2 * 2 * 8 * 2048,
        "expert_product": 2 * 8 * 2048,
        "routing_maps": 8 * 8,
        "shared_expert_hidden": 2 * 3 * 2048,
    }


def test_a_dense_layer_with_tensor_parallelism_matches_a_hand_count(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    parallel = ParallelSpec(num_gpus=8, tensor=2, sequence_parallel=True)
    saved = bytes_by_name(make_recipe(models["glm_4_5_air"], parallel), is_moe=False)
    tokens = 4096
    assert saved["mlp_hidden"] == 2 * 3 * tokens * 10_944 // 2
    assert saved["mlp_input"] == 2 * (tokens // 2) * 4096
    assert saved["queries_keys_values"] == 2 * tokens * 128 * (96 + 2 * 8) // 2


@pytest.mark.parametrize(
    ("modules", "kib_per_token"),
    [((), 446), (("moe_act",), 414), (("layernorm",), 418), (("mla_up_proj",), 318), (("moe",), 225)],
)
def test_each_recompute_module_frees_its_tensors(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker, modules: tuple[str, ...], kib_per_token: int
) -> None:
    tensors = layer_tensors(make_recipe(models["deepseek_v3"], ONE_NODE), is_moe=True)
    assert kept_bytes(tensors, modules) / 4096 / 1024 == pytest.approx(kib_per_token, abs=0.5)


def test_a_fused_norm_keeps_its_output_whatever_is_recomputed(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    model = models["mixtral_8x7b"]
    fused = layer_tensors(make_recipe(model, ONE_NODE), is_moe=True)
    native = KernelSpec(family="torch_native")
    separate = layer_tensors(make_recipe(model, ONE_NODE, kernels=native), is_moe=True)
    vector_bytes = 2 * 4096 * 4096
    assert kept_bytes(fused, ()) - kept_bytes(fused, ("layernorm",)) == vector_bytes
    assert kept_bytes(separate, ()) - kept_bytes(separate, ("layernorm",)) == 2 * vector_bytes


def test_attention_that_is_not_fused_keeps_every_score(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    unfused = KernelSpec(family="transformer_engine", attention="unfused")
    recipe = make_recipe(models["mixtral_8x7b"], ONE_NODE, kernels=unfused)
    assert bytes_by_name(recipe, is_moe=True)["attention_statistics"] == 2 * 4096 * 4096 * 32


def test_expert_parallelism_trades_tokens_and_does_not_shed_them(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    model = models["qwen3_30b_a3b"]
    alone = make_recipe(model, ONE_NODE)
    spread = make_recipe(model, ParallelSpec(num_gpus=8, expert=8))
    assert bytes_by_name(alone, is_moe=True) == bytes_by_name(spread, is_moe=True)


def test_expert_tensor_parallelism_gathers_the_tokens_and_divides_the_width(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    model = models["mixtral_8x7b"]
    alone = bytes_by_name(make_recipe(model, ONE_NODE), is_moe=True)
    split = bytes_by_name(make_recipe(model, ParallelSpec(num_gpus=8, expert_tensor=2)), is_moe=True)
    assert split["dispatched_tokens"] == 2 * alone["dispatched_tokens"]
    assert split["expert_gate_up"] == alone["expert_gate_up"]


def test_fp8_keeps_the_inputs_of_expert_products_at_one_byte(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = make_recipe(models["qwen3_30b_a3b"], ONE_NODE, precision="fp8_blockwise")
    saved = bytes_by_name(recipe, is_moe=True)
    assert saved["dispatched_tokens"] == 4096 * 8 * 2048
    assert saved["expert_gate_up"] == 2 * 2 * 4096 * 8 * 768


def test_padding_to_capacity_costs_its_factor(models: dict[str, ModelSpec], make_recipe: RecipeMaker) -> None:
    model = models["mixtral_8x7b"]
    assert model.moe is not None
    padded = make_recipe(model, ONE_NODE, token_drop=TokenDrop(capacity_factor=1.5, pad_to_capacity=True))
    dropping = make_recipe(model, ONE_NODE, token_drop=TokenDrop(capacity_factor=1.5))
    assert expert_token_copies(padded, model.moe) == 1.5 * 4096 * 2
    assert expert_token_copies(dropping, model.moe) == 4096 * 2


def test_context_parallelism_divides_the_tokens(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    parallel = ParallelSpec(num_gpus=8, context=2, tensor=2, sequence_parallel=True)
    counts = token_counts(make_recipe(models["mixtral_8x7b"], parallel, micro_batch_size=2))
    assert counts.gathered == 4096
    assert counts.sharded == 2048


def test_full_recomputation_keeps_one_vector_per_unit(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    model = models["qwen3_30b_a3b"]
    chunk = middle_chunk(4, 5, 6, 7, 8)
    vector_bytes = 2 * 4096 * 2048
    each = make_recipe(model, ONE_NODE, recompute=FULL)
    pairs = make_recipe(model, ONE_NODE, recompute=FULL.model_copy(update={"num_layers": 2}))
    block = make_recipe(
        model, ONE_NODE, recompute=Recompute(granularity="full", method="block", num_layers=3)
    )
    layer_bytes = kept_bytes(layer_tensors(each, is_moe=True), ())
    assert chunk_activation_bytes(each, chunk) == 5 * vector_bytes
    assert chunk_activation_bytes(pairs, chunk) == 3 * vector_bytes
    assert chunk_activation_bytes(block, chunk) == 3 * vector_bytes + 2 * layer_bytes


schedules = st.fixed_dictionaries(
    {
        "num_groups": st.integers(1, 6),
        "pipeline": st.integers(2, 8),
        "num_chunks": st.integers(2, 5),
        "overlaps": st.booleans(),
        "rank_fraction": st.floats(0, 0.999),
    }
)


@given(drawn=schedules)
def test_interleaved_chunks_of_equal_size_follow_the_closed_form(drawn: dict[str, float]) -> None:
    pipeline, num_chunks = int(drawn["pipeline"]), int(drawn["num_chunks"])
    rank = int(drawn["rank_fraction"] * pipeline)
    num_micro_batches = int(drawn["num_groups"]) * pipeline
    peak = peak_in_flight_bytes(
        [7] * num_chunks,
        num_micro_batches=num_micro_batches,
        pipeline=pipeline,
        pipeline_rank=rank,
        group_size=pipeline,
        overlaps_expert_parallel=bool(drawn["overlaps"]),
    )
    # overlap warms up with one pass more, but from then on a pass comes as another goes
    num_warmup = 2 * (pipeline - rank - 1) + (num_chunks - 1) * pipeline
    assert peak == 7 * min(num_micro_batches * num_chunks, num_warmup + 1)


@pytest.mark.parametrize(
    ("pipeline_rank", "num_micro_batches", "in_flight"), [(0, 16, 4), (1, 16, 3), (3, 16, 1), (0, 2, 2)]
)
def test_1f1b_holds_as_many_micro_batches_as_stages_follow(
    pipeline_rank: int, num_micro_batches: int, in_flight: int
) -> None:
    peak = peak_in_flight_bytes(
        [10],
        num_micro_batches=num_micro_batches,
        pipeline=4,
        pipeline_rank=pipeline_rank,
        group_size=4,
        overlaps_expert_parallel=False,
    )
    assert peak == 10 * in_flight


def test_unequal_chunks_are_weighed_as_they_pass() -> None:
    # PP2, two chunks, last rank, two micro batches: F0 F0 F1 B1 F1 B1 B0 B0
    peak = peak_in_flight_bytes(
        [100, 1],
        num_micro_batches=2,
        pipeline=2,
        pipeline_rank=1,
        group_size=2,
        overlaps_expert_parallel=False,
    )
    assert peak == 100 + 100 + 1
