"""Memory of torch's fully_shard beside hand counts, and how its parts answer to the layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from moe_bench.analysis.chunk_memory import ModelMemory
from moe_bench.analysis.params import rank_params
from moe_bench.projection.rows.torch_kept import operator_checkpoint_bytes
from moe_bench.projection.rows.torch_memory import Checkpointing, TorchPolicy, TorchRank, torch_memory
from moe_bench.projection.rows.torch_stages import StagePolicy, chunks_in_flight, stage_bytes
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import Recipe, Recompute
from tests.projection.published_rows import inferred

TORCHTITAN = TorchPolicy(
    weight_bytes=4,
    moment_bytes=8,
    step_bytes=0,
    keeps_weights_whole=False,
    defers_gradients=False,
    expert_gradient_bytes=4,
    expert_copy_bytes=0,
    loss_bytes=12,
    checkpointing=Checkpointing.OPERATORS,
    is_compiled=False,
    gathers_keys=True,
    stages=StagePolicy(num_buffered=1, keeps_outputs=False, keeps_logits=False),
)
PIPELINED = replace(
    TORCHTITAN, keeps_weights_whole=True, defers_gradients=True, checkpointing=Checkpointing.BLOCKS
)
TITAN: dict[str, object] = {
    "framework": "torchtitan",
    "version": "2024-12",
    "sharding": "fsdp2",
    "source": {},
    "mbs": None,
}


def llama(**columns: object) -> Recipe:
    """Llama3.1-8B with two sequences of 8,192 tokens on each of eight GPUs."""
    plain: dict[str, object] = {"num_gpus": 8, "gbs": 16, "local_batch": 2, "num_shards": 8, "ep": None}
    return inferred(**TITAN, **(plain | {"model": "Llama3.1-8B", "seq_len": 8192} | columns)).recipe


def fullest(recipe: Recipe, policy: TorchPolicy = TORCHTITAN) -> TorchRank:
    return max(torch_memory(recipe, policy), key=lambda moment: moment.total_bytes)


def at(recipe: Recipe, place: str, policy: TorchPolicy = TORCHTITAN, *, rank: int = 0) -> TorchRank:
    """The moment `place` of one pipeline rank."""
    (found,) = (
        moment
        for moment in torch_memory(recipe, policy)
        if moment.peak_at == place and moment.pipeline_rank == rank
    )
    return found


def pipelined(**sizes: int) -> Recipe:
    """Llama3.1-8B in two stages, 16 micro batches of one sequence."""
    parallel = ParallelSpec(num_gpus=8, pipeline=2, data_sharding="megatron_fsdp", **sizes)
    return llama().model_copy(update={"parallel": parallel, "micro_batch_size": 1, "global_batch_size": 64})


def test_every_second_product_of_a_llama_layer_is_kept() -> None:
    tokens = 2 * 8192
    # input, attention's output, and of wq wk wv wo w1 w3 w2 the first, third, fifth and seventh
    elements = 4096 + 4096 + 4096 + 1024 + 14_336 + 4096
    assert operator_checkpoint_bytes(llama(), is_moe=False, is_compiled=False) == tokens * (
        2 * elements + 4 * 32
    )


def test_rows_that_experts_exchange_are_kept() -> None:
    model = {"model": "DeepSeek-V3-16B (V2-Lite-like)", "seq_len": 4096, "local_batch": 4, "gbs": 32}
    alone, exchanged = (llama(**model, ep=ep) for ep in (1, 8))
    kept = [
        operator_checkpoint_bytes(recipe, is_moe=True, is_compiled=False) for recipe in (alone, exchanged)
    ]
    # 6 experts per token, hidden size 2048, there and back
    assert kept[1] - kept[0] == 4 * 4096 * 2 * 2 * 6 * 2048


def test_states_are_twelve_bytes_per_shard_before_there_are_gradients() -> None:
    recipe = llama()
    rank = fullest(recipe)
    assert rank.peak_at == "backward of loss"
    assert rank.states_bytes == pytest.approx(12 * rank_params(recipe, 0).dense / 8, rel=1e-6)
    assert rank.kept_bytes == 32 * operator_checkpoint_bytes(recipe, is_moe=False, is_compiled=False)
    # twelve bytes per logit, and the inputs of the final norm and of the head
    assert rank.working_bytes == 2 * 8192 * (12 * recipe.model.vocab_size + 2 * 2 * 4096)


def test_a_compiled_layer_does_not_keep_its_last_product() -> None:
    plain, compiled = (
        operator_checkpoint_bytes(llama(), is_moe=False, is_compiled=one) for one in (False, True)
    )
    assert plain - compiled == 2 * 2 * 8192 * 4096


def test_full_checkpointing_keeps_the_input_of_each_layer() -> None:
    blocks = replace(TORCHTITAN, checkpointing=Checkpointing.BLOCKS)
    assert fullest(llama(), blocks).kept_bytes == 32 * 2 * 2 * 8192 * 4096


def test_less_checkpointing_holds_more() -> None:
    held = [fullest(llama(), replace(TORCHTITAN, checkpointing=one)).total_bytes for one in Checkpointing]
    none, operators, blocks = held
    assert none > operators > blocks


def test_more_shards_hold_less() -> None:
    few, many = llama(), llama(num_gpus=64, gbs=128, num_shards=64)
    saved = fullest(few).total_bytes - fullest(many).total_bytes
    assert saved == pytest.approx(12 * rank_params(few, 0).dense * (1 / 8 - 1 / 64), rel=1e-3)


def test_streams_of_fully_shard_keep_shards_of_gradients_and_what_was_last_gathered() -> None:
    recipe = llama()
    moment = at(recipe, "backward of loss")
    outside = 2 * recipe.model.vocab_size * 4096
    layer = (rank_params(recipe, 0).dense - outside) // 32
    shards = rank_params(recipe, 0).dense // 8
    assert moment.apart_bytes == pytest.approx(4 * shards + 2 * (outside + layer), rel=1e-4)
    assert moment.cached_bytes - moment.total_bytes == moment.apart_bytes + moment.between_bytes


def test_what_layers_took_forward_is_of_no_use_to_logits_alone() -> None:
    assert at(llama(), "backward of loss").between_bytes > 0
    assert at(llama(), "backward of layer").between_bytes == 0


def test_whole_weights_and_deferred_gradients_are_those_of_the_rank() -> None:
    recipe = pipelined()
    moment = at(recipe, "backward of layer", PIPELINED)
    dense = rank_params(recipe, 0).dense
    layer = (dense - recipe.model.vocab_size * 4096) / 16
    assert moment.whole_bytes == pytest.approx((2 + 4) * dense + 2 * layer, rel=1e-6)


def test_a_second_chunk_has_no_gradients_yet_where_all_forward_passes_come_first() -> None:
    long, short = pipelined(virtual_pipeline=2), pipelined(virtual_pipeline=2)
    short = short.model_copy(update={"global_batch_size": 8})
    assert (long.num_micro_batches, short.num_micro_batches) == (16, 2)
    saved = [at(one, "backward of layer", PIPELINED).whole_bytes for one in (long, short)]
    assert saved[0] - saved[1] == pytest.approx(4 * rank_params(long, 0).dense / 2, rel=1e-6)


def test_stages_hold_a_buffer_each_way_per_micro_batch_and_outputs_in_flight() -> None:
    recipe, vector = pipelined(), 2 * 8192 * 4096
    new = StagePolicy(num_buffered=16, keeps_outputs=False, keeps_logits=False)
    old = replace(new, keeps_outputs=True, keeps_logits=True)
    assert [chunks_in_flight(recipe, new, rank) for rank in (0, 1)] == [2, 1]
    # the first stage receives gradients, the last one inputs, of which the layers count what is in flight
    assert [stage_bytes(recipe, new, rank) for rank in (0, 1)] == [(16 + 2) * vector, 15 * vector]
    logits = 2 * 8192 * recipe.model.vocab_size
    assert [stage_bytes(recipe, old, rank) for rank in (0, 1)] == [32 * vector, 15 * vector + 16 * logits]
    assert stage_bytes(llama(), old, 0) == 0


def test_tensor_parallel_layers_hold_gathered_inputs_and_a_copy() -> None:
    recipe = llama(tp=2, num_shards=4)
    blocks = replace(TORCHTITAN, checkpointing=Checkpointing.BLOCKS)
    sequence = recipe.model_copy(
        update={"parallel": recipe.parallel.model_copy(update={"data_sharding": "distributed_optimizer"})}
    )
    walk = ModelMemory(sequence.model_copy(update={"recompute": Recompute()}))
    layer = walk.layer(is_moe=False, is_recomputed=True)
    gathered = 2 * recipe.micro_batch_size * 8192 * 4096
    assert at(recipe, "backward of layer", blocks).working_bytes == (
        layer.backward.total_bytes - layer.kept_bytes + 3 * gathered
    )


def test_context_ranks_gather_keys_and_values_for_every_head_of_queries() -> None:
    recipe = llama(cp=2, num_shards=4)
    working = [
        at(recipe, "backward of layer", replace(TORCHTITAN, gathers_keys=one)).working_bytes
        for one in (True, False)
    ]
    # keys and values, two bytes, the whole sequence, 32 heads of 128
    assert working[0] - working[1] == 2 * 2 * recipe.micro_batch_size * 8192 * 4096


def test_experts_may_wait_in_another_type_and_have_quantized_copies() -> None:
    moe = {"model": "DeepSeek-V3-16B (V2-Lite-like)", "seq_len": 4096, "ep": 4}
    recipe = llama(**moe).model_copy(update={"micro_batch_size": 4, "global_batch_size": 64})
    policy = replace(TORCHTITAN, keeps_weights_whole=True, defers_gradients=True)
    experts = rank_params(recipe, 0).expert
    assert (recipe.num_micro_batches, recipe.parallel.expert_data) == (2, 2)
    fp32, bf16, copied = (
        at(
            recipe, "backward of loss", replace(policy, expert_gradient_bytes=one, expert_copy_bytes=two)
        ).whole_bytes
        for one, two in ((4, 0), (2, 0), (4, 2.0625))
    )
    assert fp32 - bf16 == pytest.approx(2 * experts, rel=1e-6)
    assert copied - fp32 == round(2.0625 * experts)


def test_the_optimizer_may_be_the_fullest_moment() -> None:
    recipe = llama(seq_len=1024, gbs=8, local_batch=1)
    moment = fullest(recipe, replace(TORCHTITAN, step_bytes=64, checkpointing=Checkpointing.BLOCKS))
    assert moment.peak_at == "optimizer step"
    assert moment.states_bytes == pytest.approx(16 * rank_params(recipe, 0).dense / 8, rel=1e-6)
