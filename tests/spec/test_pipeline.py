"""Layers land on the stages where Megatron-Core puts them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import LayoutError, expand_layout, pipeline_chunks


def test_a_layout_string_unfolds_groups_and_repeats() -> None:
    assert expand_layout("Et*3|(tt|)*2m|L") == ("Ettt", "tt", "tt", "m", "L")
    assert expand_layout("Ettt|(tt|)*29,m|L")[-2:] == ("m", "L")


def test_deepseek_v3_on_32_stages_is_counted_right() -> None:
    parallel = ParallelSpec(num_gpus=256, pipeline=4, virtual_pipeline=8, layout="Et|(tt|)*30L", expert=64)
    chunks = pipeline_chunks(parallel, num_layers=61, num_mtp_layers=0)
    per_rank = [
        sum(len(chunk.layers) for chunk in chunks if chunk.pipeline_rank == rank) for rank in range(4)
    ]
    # rank 0: 1 + 7 x 2, ranks 1 and 2: 8 x 2, rank 3: 7 x 2 and the loss alone
    assert per_rank == [15, 16, 16, 14]
    assert chunks[-1].has_loss
    assert not chunks[-1].layers


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("Ett|tL", "3 decoder layer letters"),
        ("Ett|ttx", "unknown layout letters x"),
        ("Ett|tt|L", "3 stages, PP"),
        ("tEt|ttL", "the first stage must begin with E"),
    ],
)
def test_a_layout_that_cannot_exist_says_why(layout: str, words: str) -> None:
    with pytest.raises(LayoutError, match=words):
        pipeline_chunks(ParallelSpec(num_gpus=2, pipeline=2, layout=layout), num_layers=4, num_mtp_layers=0)


def test_embedding_and_loss_may_count_as_layers() -> None:
    parallel = ParallelSpec(
        num_gpus=8, pipeline=8, virtual_pipeline=4, embedding_counts_as_layer=True, loss_counts_as_layer=True
    )
    chunks = pipeline_chunks(parallel, num_layers=94, num_mtp_layers=0)
    assert [len(chunk.layers) for chunk in chunks] == [2, *[3] * 30, 2]


@given(pipeline=st.integers(1, 8), virtual=st.integers(1, 4), per_chunk=st.integers(1, 4))
def test_every_layer_stands_on_exactly_one_chunk(pipeline: int, virtual: int, per_chunk: int) -> None:
    parallel = ParallelSpec(num_gpus=pipeline, pipeline=pipeline, virtual_pipeline=virtual)
    num_layers = pipeline * virtual * per_chunk
    chunks = pipeline_chunks(parallel, num_layers=num_layers, num_mtp_layers=1)
    assert [layer for chunk in chunks for layer in chunk.layers] == list(range(num_layers))
    assert sum(chunk.has_embedding for chunk in chunks) == sum(chunk.has_loss for chunk in chunks) == 1
    assert sum(chunk.num_mtp_layers for chunk in chunks) == 1
