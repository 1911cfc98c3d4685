"""Recordings of routing are read, dealt out again, and refused where they are none."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.errors import BadInputError
from moe_bench.spec.routing_trace import busiest_expert_rank, dealt_counts, read_trace


def test_counts_keep_recorded_proportions_by_hand() -> None:
    # 8 tokens, top 2: 16 choices over 1 + 2 + 2 + 3 eighths
    assert dealt_counts((1, 2, 2, 3), num_tokens=8, top_k=2) == (2, 4, 4, 6)


def test_an_expert_takes_a_token_once() -> None:
    # 3 of 4 recorded tokens went to expert 0: 6 of 8 choices, but there are 4 tokens
    assert dealt_counts((6, 1, 1), num_tokens=4, top_k=2) == (4, 2, 2)


@given(
    st.lists(st.integers(0, 1000), min_size=4, max_size=16).filter(any),
    st.integers(1, 64),
    st.integers(1, 4),
)
def test_every_choice_is_dealt_and_none_twice_to_a_token(
    recorded: list[int], num_tokens: int, top_k: int
) -> None:
    counts = dealt_counts(recorded, num_tokens=num_tokens, top_k=top_k)
    assert sum(counts) == num_tokens * top_k
    assert max(counts) <= num_tokens


def test_the_busiest_rank_is_that_of_all_layers_together() -> None:
    assert busiest_expert_rank(((9, 1, 0, 0), (0, 0, 5, 5), (1, 1, 4, 4)), num_ranks=2) == 1


@pytest.mark.parametrize("text", ["[1, 2]", "[[1, -2]]", "{"])
def test_a_file_that_is_no_trace_is_refused_with_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.json"
    path.write_text(text)
    with pytest.raises(BadInputError, match=r"--routing .*trace.json: not a routing trace"):
        read_trace(path, option="--routing", choices="balanced")
