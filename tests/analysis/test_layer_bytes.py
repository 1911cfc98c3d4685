"""Byte floors of one MoE layer, by hand."""

from __future__ import annotations

from moe_bench.analysis.layer_bytes import permute_bytes, router_bytes, unpermute_bytes
from moe_bench.spec.layer_case import swiglu_case

CASE = swiglu_case("hand", num_tokens=10, hidden_size=8, expert_ffn_hidden_size=4, num_experts=4, top_k=2)
"""A row has 8 x 2 = 16 bytes; 10 tokens leave as 20 rows."""


def test_the_router_reads_tokens_twice_and_writes_their_gradient() -> None:
    assert router_bytes(CASE) == 3 * 10 * 16


def test_copies_are_written_forward_and_read_backward() -> None:
    assert permute_bytes(CASE, num_received_rows=20) == 2 * (10 + 20) * 16
    assert unpermute_bytes(CASE, num_received_rows=20) == 2 * (20 + 10) * 16


def test_arriving_rows_are_sorted_where_a_rank_has_several_experts() -> None:
    spread = CASE.model_copy(update={"ep_size": 2})
    assert permute_bytes(spread, num_received_rows=24) == (2 * 30 + 4 * 24) * 16
    alone = CASE.model_copy(update={"ep_size": 4})
    assert permute_bytes(alone, num_received_rows=24) == 2 * 30 * 16


def test_shared_experts_are_added_once() -> None:
    moe = CASE.moe.model_copy(update={"shared_expert_ffn_hidden_size": 4})
    shared = CASE.model_copy(update={"moe": moe})
    assert unpermute_bytes(shared, num_received_rows=20) == (2 * 30 + 2 * 10) * 16
