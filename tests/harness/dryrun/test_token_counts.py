"""Token counts add up, whether balanced or given."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.errors import BadInputError
from moe_bench.harness.dryrun.one_rank import dry_run_rank
from moe_bench.harness.dryrun.token_counts import balanced_counts, host_routing_map
from tests.harness.dryrun.conftest import toy

EP4 = {"num_gpus": 4, "expert": 4}


@given(
    num_tokens=st.integers(1, 500),
    num_experts=st.integers(1, 64),
    top_k=st.integers(1, 8),
    num_senders=st.integers(1, 16),
)
def test_balanced_counts_differ_by_one_at_most_for_sender_and_for_all(
    num_tokens: int, num_experts: int, top_k: int, num_senders: int
) -> None:
    senders = [
        balanced_counts(num_tokens=num_tokens, num_experts=num_experts, top_k=top_k, sender=sender)
        for sender in range(num_senders)
    ]
    for counts in (*senders, tuple(map(sum, zip(*senders, strict=True)))):
        assert max(counts) - min(counts) <= 1
    assert {sum(counts) for counts in senders} == {num_tokens * top_k}


def test_ranks_of_kimi_k2_send_and_receive_equally_many_tokens() -> None:
    """32,768 choices of 384 experts leave 128 over, a third of a token for each: two for the 6 of a rank."""
    senders = [
        balanced_counts(num_tokens=4096, num_experts=384, top_k=8, sender=sender) for sender in range(64)
    ]
    sent = {sum(counts[rank * 6 : rank * 6 + 6]) for counts in senders for rank in range(64)}
    assert sent == {32_768 // 64}
    received = tuple(map(sum, zip(*senders, strict=True)))
    assert {sum(received[rank * 6 : rank * 6 + 6]) for rank in range(64)} == {32_768}


def test_a_map_has_the_counts_as_column_sums_and_every_token_as_often() -> None:
    counts = (7, 1, 4, 0, 8)
    routing_map = host_routing_map(counts, num_tokens=10)
    assert tuple(routing_map.sum(dim=0).tolist()) == counts
    assert routing_map.sum(dim=1).tolist() == [2] * 10


@pytest.mark.parametrize(
    ("counts", "complaint"),
    [
        (((16,) * 8,) * 3, "3 rows of [8] counts; one row for each of the 4 ranks"),
        (((32,) * 4,) * 4, "4 rows of [4] counts"),
        (((16,) * 7 + (15,), *((16,) * 8,) * 3), "row 0 adds up to 127; a micro batch makes 128 choices"),
    ],
)
def test_a_matrix_that_does_not_fit_is_refused(counts: tuple[tuple[int, ...], ...], complaint: str) -> None:
    recipe = toy("qwen3_30b_a3b", parallel=EP4)
    with pytest.raises(BadInputError) as refused:
        dry_run_rank(recipe, 0, counts=counts)
    assert complaint in str(refused.value)
