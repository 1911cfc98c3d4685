"""Process groups: made with Megatron-Core's sizes, and destroyed whatever happens."""

from __future__ import annotations

from torch import distributed

from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.workers import Seat
from tests.harness.zygote import Zygote

SIZES = {
    "tensor_model_parallel_size": 2,
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "embedding_pipeline_ranks": (0,),
}


def places(seat: Seat) -> tuple[int, int, int, bool, bool]:
    from megatron.core import parallel_state

    try:
        with process_groups(seat.rendezvous, backend="gloo", sizes=SIZES, listen_fd=seat.listen_fd):
            place = (
                parallel_state.get_tensor_model_parallel_rank(),
                parallel_state.get_data_parallel_rank(),
                parallel_state.get_expert_model_parallel_rank(),
            )
            raise KeyError
    except KeyError:
        return (*place, distributed.is_initialized(), parallel_state.is_initialized())


def test_ranks_stand_where_megatron_core_puts_them_and_nothing_is_left(zygote: Zygote) -> None:
    assert zygote.fork(4, places) == [
        (0, 0, 0, False, False),
        (1, 0, 1, False, False),
        (0, 1, 0, False, False),
        (1, 1, 1, False, False),
    ]
