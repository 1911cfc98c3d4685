"""What runs without a GPU: positions, the sink's gate, and flex attention's forward pass."""

import math
from typing import Any

import pytest
import torch

from moe_bench.harness.kernels.attention_kernels import (
    apply_sink,
    block_mask,
    blockwise_attention,
    is_visible,
    masked_attention,
    zigzag_positions,
)
from tests.harness.kernels.ranks import Groups

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cp_size", "expected"),
    [
        (1, [[0, 1, 2, 3, 4, 5, 6, 7]]),
        (2, [[0, 1, 6, 7], [2, 3, 4, 5]]),
        (4, [[0, 7], [1, 6], [2, 5], [3, 4]]),
    ],
)
def test_each_rank_holds_an_early_and_a_late_chunk(cp_size: int, expected: list[list[int]]) -> None:
    num_local = 8 // cp_size
    positions = [
        zigzag_positions(num_local, cp_size=cp_size, cp_rank=rank, device=CPU).tolist()
        for rank in range(cp_size)
    ]
    assert positions == expected


def cut_by_megatron_core(groups: Groups) -> list[int]:
    from megatron.core.utils import get_batch_on_this_cp_rank

    batch = {"tokens": torch.arange(32)[None], "cu_seqlens": None}
    return get_batch_on_this_cp_rank(batch, False, cp_group=groups.cp)["tokens"][0].tolist()


def test_positions_are_those_at_which_megatron_core_cuts_a_batch(run_ranks: Any) -> None:
    ranks = run_ranks(cut_by_megatron_core, 2, {"context_parallel_size": 2})
    assert ranks == [zigzag_positions(16, cp_size=2, cp_rank=rank, device=CPU).tolist() for rank in range(2)]


@pytest.mark.usefixtures("each_device")
def test_a_window_counts_the_tokens_before_the_query() -> None:
    positions = torch.arange(5)
    visible = is_visible(positions[:, None], positions[None, :], 2)
    assert visible.sum(dim=1).tolist() == [1, 2, 3, 3, 3]


@pytest.mark.usefixtures("each_device")
def test_the_sink_gate_on_scores_equals_a_softmax_with_one_more_column() -> None:
    """Output and gradients of scores, values and sink, the gate through the log-sum-exp as on a GPU."""
    scores, values = (
        torch.randn(1, 2, 5, 7, dtype=torch.float64),
        torch.randn(1, 2, 7, 3, dtype=torch.float64),
    )
    sink, grad = torch.randn(2, dtype=torch.float64), torch.randn(1, 2, 5, 3, dtype=torch.float64)
    gated = [tensor.clone().requires_grad_() for tensor in (scores, values, sink)]
    output = apply_sink(gated[0].softmax(-1) @ gated[1], gated[0].logsumexp(-1), gated[2])
    output.backward(grad)
    plain = [tensor.clone().requires_grad_() for tensor in (scores, values, sink)]
    column = plain[2].view(1, 2, 1, 1).expand(1, 2, 5, 1)
    expected = torch.cat([plain[0], column], dim=-1).softmax(-1)[..., :-1] @ plain[1]
    expected.backward(grad)
    torch.testing.assert_close(output, expected)
    for mine, reference in zip(gated, plain, strict=True):
        torch.testing.assert_close(mine.grad, reference.grad)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("with_sink", [False, True])
@pytest.mark.parametrize("cp_size", [1, 2])
def test_flex_attention_equals_masked_attention(
    window: int | None, with_sink: bool, cp_size: int, each_device: torch.device
) -> None:
    """Forward only: torch has flex attention's backward on GPUs alone."""
    num_tokens = 32
    query = torch.randn(num_tokens // cp_size, 2, 4, 24)
    key, value = torch.randn(num_tokens, 2, 2, 24), torch.randn(num_tokens, 2, 2, 16)
    sink = torch.randn(4) if with_sink else None
    ranks = [
        zigzag_positions(len(query), cp_size=cp_size, cp_rank=rank, device=each_device)
        for rank in range(cp_size)
    ]
    query_positions, key_positions = ranks[-1], torch.cat(ranks)
    scale = 1 / math.sqrt(24)
    mask = block_mask(query_positions, key_positions, window)
    with torch.no_grad():
        output = blockwise_attention(query, key, value, scale=scale, mask=mask, sink=sink)
    visible = is_visible(query_positions[:, None], key_positions[None, :], window)
    expected = masked_attention(query, key, value, scale=scale, visible=visible, sink=sink)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
