"""One rank's place on its host."""

from __future__ import annotations

import pytest

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.rank import gpu_index
from moe_bench.spec.rendezvous import Rendezvous


def rank(local_rank: int) -> Rendezvous:
    return Rendezvous(
        rank=8 + local_rank, world_size=16, local_rank=local_rank, master_addr="n1", master_port=1
    )


def test_a_rank_takes_the_gpu_of_its_number() -> None:
    assert [gpu_index(rank(number), num_visible=8) for number in range(8)] == list(range(8))


def test_a_rank_that_sees_one_gpu_takes_that() -> None:
    assert [gpu_index(rank(number), num_visible=1) for number in range(8)] == [0] * 8


@pytest.mark.parametrize("num_visible", [0, 2])
def test_a_rank_without_a_gpu_is_refused(num_visible: int) -> None:
    with pytest.raises(MissingRequirementError, match=rf"rank 11: no GPU 3 on .*, which shows {num_visible}"):
        gpu_index(rank(3), num_visible=num_visible)
