"""Layouts for rows that print stages alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.projection.rows.layout import EVEN, WITH_ENDS, balanced_layout, even_split
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.pipeline import expand_layout, pipeline_chunks


@pytest.mark.parametrize(
    ("layers", "mtp", "stages", "published"),
    [
        (61, 1, 32, "Et|(tt|)*30mL"),
        (61, 0, 32, "Et|(tt|)*30L"),
        (61, 1, 16, "Et*4|(tttt|)*14tmL"),
        (61, 0, 16, "Et*4|(tttt|)*14tL"),
        (61, 1, 8, "Et*8|(tttttttt|)*6tttttmL"),
        (61, 1, 4, "Et*16|(tttttttttttttttt|)*2tttttttttttttmL"),
    ],
)
def test_the_layouts_of_megatron_bridge(layers: int, mtp: int, stages: int, published: str) -> None:
    assert tuple(balanced_layout(layers, mtp, stages).split("|")) == expand_layout(published)


@given(layers=st.integers(1, 130), mtp=st.integers(0, 2), stages=st.integers(2, 40))
def test_a_balanced_layout_can_be_built(layers: int, mtp: int, stages: int) -> None:
    parallel = ParallelSpec(num_gpus=stages, pipeline=stages, layout=balanced_layout(layers, mtp, stages))
    counts = [len(chunk.layers) for chunk in pipeline_chunks(parallel, num_layers=layers, num_mtp_layers=mtp)]
    assert sum(counts) == layers
    assert max(counts) - min(counts[:-1]) <= 1


def test_layers_that_divide_need_no_layout() -> None:
    assert even_split(56, 0, 8, 7) == EVEN
    # 94 and 126 layers divide with embedding and loss counted
    assert even_split(94, 0, 8, 4) == WITH_ENDS
    assert even_split(126, 0, 8, 8) == WITH_ENDS
    assert even_split(61, 1, 1, 1) == EVEN


def test_layers_that_do_not_divide_or_stand_beside_mtp_need_one() -> None:
    assert even_split(61, 0, 8, 4) is None
    assert even_split(64, 1, 8, 4) is None
