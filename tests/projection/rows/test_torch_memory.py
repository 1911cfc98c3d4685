"""Memory of torch's fully_shard beside hand counts, and how its parts answer to the layout."""

from __future__ import annotations

import pytest

from moe_bench.analysis.params import rank_params
from moe_bench.projection.rows.torch_kept import operator_checkpoint_bytes
from moe_bench.projection.rows.torch_memory import Checkpointing, TorchPolicy, TorchRank, torch_memory
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import Recipe
from tests.projection.published_rows import inferred

TORCHTITAN = TorchPolicy(
    weight_bytes=4,
    moment_bytes=8,
    step_bytes=0,
    keeps_weights_whole=False,
    defers_gradients=False,
    loss_bytes=12,
    checkpointing=Checkpointing.OPERATORS,
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


def fullest(recipe: Recipe, **changes: object) -> TorchRank:
    policy = {name: getattr(TORCHTITAN, name) for name in TORCHTITAN.__dataclass_fields__}
    ranks = torch_memory(recipe, TorchPolicy(**(policy | changes)))
    return max(ranks, key=lambda rank: rank.total_bytes)


def test_every_second_product_of_a_llama_layer_is_kept() -> None:
    tokens = 2 * 8192
    # input, attention's output, and of wq wk wv wo w1 w3 w2 the first, third, fifth and seventh
    elements = 4096 + 4096 + 4096 + 1024 + 14_336 + 4096
    assert operator_checkpoint_bytes(llama(), is_moe=False) == tokens * (2 * elements + 4 * 32)


def test_rows_that_experts_exchange_are_kept() -> None:
    model = {"model": "DeepSeek-V3-16B (V2-Lite-like)", "seq_len": 4096, "local_batch": 4, "gbs": 32}
    alone, exchanged = (llama(**model, ep=ep) for ep in (1, 8))
    kept = [operator_checkpoint_bytes(recipe, is_moe=True) for recipe in (alone, exchanged)]
    # 6 experts per token, hidden size 2048, there and back
    assert kept[1] - kept[0] == 4 * 4096 * 2 * 2 * 6 * 2048


def test_states_are_twelve_bytes_per_shard_before_there_are_gradients() -> None:
    recipe = llama()
    rank = fullest(recipe)
    assert rank.peak_at == "backward of loss"
    assert rank.states_bytes == pytest.approx(12 * rank_params(recipe, 0).dense / 8, rel=1e-6)
    assert rank.kept_bytes == 32 * operator_checkpoint_bytes(recipe, is_moe=False)
    assert rank.working_bytes == 12 * 2 * 8192 * recipe.model.vocab_size


def test_full_checkpointing_keeps_the_input_of_each_layer() -> None:
    assert fullest(llama(), checkpointing=Checkpointing.BLOCKS).kept_bytes == 32 * 2 * 2 * 8192 * 4096


def test_less_checkpointing_holds_more() -> None:
    held = [fullest(llama(), checkpointing=one).total_bytes for one in Checkpointing]
    none, operators, blocks = held
    assert none > operators > blocks


def test_more_shards_hold_less() -> None:
    few, many = llama(), llama(num_gpus=64, gbs=128, num_shards=64)
    saved = fullest(few).total_bytes - fullest(many).total_bytes
    assert saved == pytest.approx(12 * rank_params(few, 0).dense * (1 / 8 - 1 / 64), rel=1e-3)


def test_whole_weights_and_deferred_gradients_are_those_of_the_rank() -> None:
    pipelined = llama().model_copy(
        update={"parallel": ParallelSpec(num_gpus=8, pipeline=2, data_sharding="megatron_fsdp")}
    )
    rank = torch_memory(
        pipelined,
        TorchPolicy(
            weight_bytes=4,
            moment_bytes=8,
            step_bytes=0,
            keeps_weights_whole=True,
            defers_gradients=True,
            loss_bytes=12,
            checkpointing=Checkpointing.BLOCKS,
        ),
    )[0]
    assert rank.whole_bytes == pytest.approx((2 + 4) * rank_params(pipelined, 0).dense, rel=1e-6)


def test_the_optimizer_may_be_the_fullest_moment() -> None:
    recipe = llama(seq_len=1024, gbs=8, local_batch=1)
    rank = fullest(recipe, step_bytes=64, checkpointing=Checkpointing.BLOCKS)
    assert rank.peak_at == "optimizer step"
    assert rank.states_bytes == pytest.approx(16 * rank_params(recipe, 0).dense / 8, rel=1e-6)
