"""Synthetic tokens: the same global samples in every layout."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe_bench.harness.batches import BatchPlan, step_batches
from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.workers import Seat
from tests.harness.zygote import Zygote

SEQ_LEN = 16


def plan(*, data_rank: int = 0, data_size: int = 1, micro_batch_size: int = 1, **changes: Any) -> BatchPlan:
    fields: dict[str, Any] = {
        "seed": 7,
        "vocab_size": 97,
        "seq_len": SEQ_LEN,
        "micro_batch_size": micro_batch_size,
        "num_micro_batches": 8 // (data_size * micro_batch_size),
        "data_rank": data_rank,
        "data_size": data_size,
        "context_group": SimpleNamespace(size=lambda: 1),
        "device": "cpu",
    }
    return BatchPlan(**(fields | changes))


def tokens(plan: BatchPlan, step: int = 0) -> list[list[int]]:
    return [row for batch in step_batches(plan, step) for row in batch["tokens"].tolist()]


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_data_ranks_share_out_the_samples_of_one_process(micro_batch_size: int) -> None:
    whole = tokens(plan(micro_batch_size=micro_batch_size))
    shares = [
        step_batches(plan(data_rank=rank, data_size=2, micro_batch_size=micro_batch_size), 0)
        for rank in range(2)
    ]
    dealt = [row for pair in zip(*shares, strict=True) for batch in pair for row in batch["tokens"].tolist()]
    assert dealt == whole


def test_a_label_is_the_next_token() -> None:
    for batch in step_batches(plan(), 0):
        assert torch.equal(batch["labels"][:, :-1], batch["tokens"][:, 1:])


def test_every_token_counts_and_positions_rise_from_zero() -> None:
    (batch,) = step_batches(plan(micro_batch_size=8), 0)
    assert batch["loss_mask"].sum() == 8 * SEQ_LEN
    assert batch["position_ids"].tolist() == [list(range(SEQ_LEN))] * 8


def test_tokens_lie_within_the_vocabulary_and_reach_most_of_it() -> None:
    seen = {token for row in tokens(plan()) for token in row}
    assert seen <= set(range(97))
    assert len(seen) > 48


@pytest.mark.parametrize("other", [{"seed": 8}, {"step": 1}])
def test_another_seed_or_step_gives_other_samples(other: dict[str, int]) -> None:
    step = other.pop("step", 0)
    assert not set(map(tuple, tokens(plan()))) & set(map(tuple, tokens(plan(**other), step)))


def context_share(seat: Seat) -> list[int]:
    sizes = {"context_parallel_size": 2, "embedding_pipeline_ranks": (0,)}
    with process_groups(seat.rendezvous, backend="gloo", sizes=sizes, listen_fd=seat.listen_fd):
        from megatron.core import parallel_state

        share = plan(context_group=parallel_state.get_context_parallel_group())
        positions: list[int] = step_batches(share, 0)[0]["position_ids"][0].tolist()
        return positions


def test_context_ranks_split_a_sequence_in_zigzag_order(zygote: Zygote) -> None:
    assert zygote.fork(2, context_share) == [
        [0, 1, 2, 3, 12, 13, 14, 15],
        [4, 5, 6, 7, 8, 9, 10, 11],
    ]
