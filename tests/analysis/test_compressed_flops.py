"""Operations of DeepSeek-V4's attention and its residual streams by hand."""

import pytest

from moe_bench.analysis.compressed_flops import (
    compressed_core_flops,
    compressed_projection_flops,
    index_score_flops,
    stream_mixing_flops,
)
from moe_bench.analysis.params import compressed_attention_params, stream_mixing_params
from moe_bench.spec.mixer import CompressedAttention

FLASH = CompressedAttention(
    q_lora_rank=1024,
    output_lora_rank=1024,
    output_groups=8,
    window_tokens=128,
    compression_ratios=(0, 4, 128),
    num_index_heads=64,
    index_head_dim=128,
    index_top_k=512,
)
HEADS = {"num_heads": 64, "head_dim": 512}
WINDOW_ONLY = 1024 * (4096 + 32_768) + 4096 * 512 + 1024 * (32_768 + 8 * 4096)
"""Queries, keys and output of a layer that compresses nothing."""
INDEXER = 1024 * 64 * 128 + 4096 * 64 + 4 * 4096 * 128


@pytest.mark.parametrize(
    ("ratio", "weights"),
    [(0, WINDOW_ONLY), (128, WINDOW_ONLY + 2 * 4096 * 512), (4, WINDOW_ONLY + 4 * 4096 * 512 + INDEXER)],
)
def test_projections_match_a_hand_count(ratio: int, weights: int) -> None:
    flops = compressed_projection_flops(tokens=3, hidden=4096, net=FLASH, ratio=ratio, **HEADS)
    assert flops == 2 * 3 * weights


@pytest.mark.parametrize(
    ("ratio", "small"),
    [
        (0, 64 + 1024 + 512),  # sinks and norms
        (128, 64 + 1024 + 512 + 128 * 512 + 512),  # and positions and norm of a compressor
        (4, 64 + 1024 + 512 + 4 * 1024 + 512 + 4 * 256 + 128),  # and of the indexer's
    ],
)
def test_parameters_are_the_projections_and_what_is_small(ratio: int, small: int) -> None:
    params = compressed_attention_params(FLASH, hidden=4096, ratio=ratio, **HEADS)
    projections = compressed_projection_flops(tokens=1, hidden=4096, net=FLASH, ratio=ratio, **HEADS) // 2
    assert (params.sharded, params.replicated) == (0, projections + small)


@pytest.mark.parametrize(
    ("ratio", "keys"),
    [(0, 128), (128, 128 + 4096 // 128 / 2), (4, 128 + 512 * (1 - 2 * 512 / 4096))],
)
def test_a_query_sees_its_window_and_compressed_keys(ratio: int, keys: float) -> None:
    flops = compressed_core_flops(num_seqs=2, seq_len=4096, net=FLASH, ratio=ratio, **HEADS)
    assert flops == 4 * 2 * 4096 * 64 * 512 * keys


def test_only_layers_that_choose_score_their_keys() -> None:
    scores = {
        ratio: index_score_flops(num_seqs=1, seq_len=4096, net=FLASH, ratio=ratio) for ratio in (0, 4, 128)
    }
    assert scores == {0: 0, 4: 2 * 4096 * 1024 * 64 * 128, 128: 0}


def test_four_streams_are_mixed_by_twenty_four_maps() -> None:
    assert stream_mixing_flops(tokens=5, hidden=4096, num_streams=4) == 2 * 5 * 4 * 4096 * 24
    assert stream_mixing_params(hidden=4096, num_streams=4) == 4 * 4096 * 24 + 24 + 3
