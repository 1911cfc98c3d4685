"""Loopback groups beside real gloo groups that hold equal inputs, and their ledger beside hand arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor, distributed

from moe_bench.harness.loopback import BACKEND, Ledger, LedgerKey, Traffic, Transfer, loopback_groups
from moe_bench.harness.workers import Seat
from tests.harness.zygote import Zygote

WORLD = 4
PLAIN: dict[str, Any] = {
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "embedding_pipeline_ranks": (0,),
}
FLOAT = 4


def rows(num: int) -> Tensor:
    """Values that no other row has, the same on every rank."""
    return torch.arange(num * 3, dtype=torch.float32).view(num, 3)


def all_gather(rank: int) -> list[Tensor]:
    single = torch.empty(WORLD * 2, 3)
    distributed.all_gather_into_tensor(single, rows(2))
    parts = [torch.empty(2, 3) for _ in range(WORLD)]
    distributed.all_gather(parts, rows(2))
    return [single, *parts]


def broadcast(rank: int) -> list[Tensor]:
    tensor = rows(2)
    distributed.broadcast(tensor, src=1)
    return [tensor]


def maximum(rank: int) -> list[Tensor]:
    tensor = rows(2)
    distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
    return [tensor]


def mean(rank: int) -> list[Tensor]:
    """Gloo has no mean; its sum over equal inputs is as many times what loopback leaves."""
    reduced, scattered = rows(2), torch.empty(2, 3)
    distributed.all_reduce(reduced)
    distributed.reduce_scatter_tensor(scattered, rows(2 * WORLD))
    is_real = distributed.get_backend() == "gloo"
    return [tensor / (WORLD if is_real else 1) for tensor in (reduced, scattered)]


def all_to_all(rank: int) -> list[Tensor]:
    even = torch.empty(2 * WORLD, 3)
    distributed.all_to_all_single(even, rows(2 * WORLD))
    # every rank sends one row to rank 0, two to rank 1 and so on, so rank r receives r + 1 from each
    sent = list(range(1, WORLD + 1))
    uneven = torch.empty((rank + 1) * WORLD, 3)
    distributed.all_to_all_single(
        uneven, rows(sum(sent)), output_split_sizes=[rank + 1] * WORLD, input_split_sizes=sent
    )
    return [even, uneven]


def gather(rank: int) -> list[Tensor]:
    parts = [torch.empty(2, 3) for _ in range(WORLD)] if rank == 0 else None
    distributed.gather(rows(2), parts, dst=0)
    return parts or []


def objects(rank: int) -> list[Tensor]:
    found: list[Any] = [None] * WORLD
    distributed.all_gather_object(found, {"value": 7})
    broadcast = [3.0]
    distributed.broadcast_object_list(broadcast, src=2)
    return [torch.tensor([entry["value"] for entry in found]), torch.tensor(broadcast)]


COLLECTIVES = (all_gather, broadcast, maximum, mean, all_to_all, gather, objects)


def run_over_gloo(seat: Seat) -> dict[str, list[Any]]:
    store = distributed.TCPStore(
        "127.0.0.1",
        seat.rendezvous.master_port,
        world_size=WORLD,
        is_master=seat.rendezvous.rank == 0,
        timeout=timedelta(seconds=60),
        master_listen_fd=seat.listen_fd if seat.rendezvous.rank == 0 else None,
    )
    distributed.init_process_group("gloo", store=store, rank=seat.rendezvous.rank, world_size=WORLD)
    try:
        return {
            collective.__name__: [tensor.tolist() for tensor in collective(seat.rendezvous.rank)]
            for collective in COLLECTIVES
        }
    finally:
        distributed.destroy_process_group()


@pytest.fixture(scope="module")
def over_gloo(zygote: Zygote) -> list[dict[str, list[Any]]]:
    """What each rank of a real group got."""
    return zygote.fork(WORLD, run_over_gloo)


@pytest.fixture
def transfers() -> list[Transfer]:
    return []


@pytest.fixture(params=range(WORLD))
def rank(request: pytest.FixtureRequest, transfers: list[Transfer]) -> Iterator[int]:
    """Each rank of a loopback job in turn."""
    with loopback_groups(world_size=WORLD, rank=request.param, sizes=PLAIN, on_transfer=transfers.append):
        transfers.clear()
        yield request.param


@pytest.mark.parametrize("collective", COLLECTIVES, ids=lambda collective: collective.__name__)
def test_equal_inputs_give_what_real_groups_give(
    over_gloo: list[dict[str, list[Any]]], rank: int, collective: Any
) -> None:
    assert [tensor.tolist() for tensor in collective(rank)] == over_gloo[rank][collective.__name__]


def test_bytes_are_those_of_the_larger_side(rank: int, transfers: list[Transfer]) -> None:
    all_gather(rank)
    mean(rank)
    all_to_all(rank)
    assert [(transfer.op, transfer.num_bytes) for transfer in transfers] == [
        ("all_gather", WORLD * 2 * 3 * FLOAT),
        ("all_gather", WORLD * 2 * 3 * FLOAT),
        ("all_reduce", 2 * 3 * FLOAT),
        ("reduce_scatter", WORLD * 2 * 3 * FLOAT),
        ("all_to_all", WORLD * 2 * 3 * FLOAT),
        ("all_to_all", (1 + 2 + 3 + 4) * 3 * FLOAT),
    ]
    assert {(transfer.group, transfer.group_size) for transfer in transfers} == {("world", WORLD)}


def test_messages_are_counted_one_by_one_and_filled_with_finite_values(
    rank: int, transfers: list[Transfer]
) -> None:
    neighbour = (rank + 1) % WORLD
    received = torch.full((5, 7), float("nan"))
    messages = [
        distributed.P2POp(distributed.isend, rows(2), neighbour),
        distributed.P2POp(distributed.irecv, received, neighbour),
    ]
    for work in distributed.batch_isend_irecv(messages):
        work.wait()
    assert [(transfer.op, transfer.num_bytes) for transfer in transfers] == [("send", 24), ("recv", 140)]
    assert received.isfinite().all()
    assert len(received.unique()) == received.numel()


def test_what_comes_from_a_neighbour_has_the_spread_of_activations(rank: int) -> None:
    received = torch.empty(64, 512, dtype=torch.bfloat16)
    distributed.recv(received, (rank + 1) % WORLD)
    assert received.float().mean().item() == pytest.approx(0, abs=0.02)
    assert received.float().std().item() == pytest.approx(1, abs=0.02)
    assert not (received[0] == received[1]).all()


def test_time_spent_on_filling_outputs_can_be_told_apart() -> None:
    entered = []

    @contextmanager
    def around() -> Iterator[None]:
        entered.append(None)
        yield

    with loopback_groups(
        world_size=WORLD, rank=0, sizes=PLAIN, on_transfer=lambda transfer: None, around_copies=around
    ):
        entered.clear()
        all_gather(0)
        distributed.all_reduce(rows(2))
    assert len(entered) == 2


def test_coalesced_collectives_are_one_transfer(rank: int, transfers: list[Transfer]) -> None:
    outputs = [torch.empty(2, 3), torch.empty(1, 3)]
    with distributed._coalescing_manager(async_ops=True) as work:
        for output in outputs:
            distributed.reduce_scatter_tensor(output, rows(WORLD * len(output)))
    work.wait()
    assert [(transfer.op, transfer.num_bytes) for transfer in transfers] == [
        ("reduce_scatter", 3 * WORLD * 3 * FLOAT)
    ]
    torch.testing.assert_close(outputs[0], rows(WORLD * 2)[2 * rank : 2 * rank + 2])


def test_splits_that_do_not_add_up_are_refused(rank: int) -> None:
    with pytest.raises(RuntimeError, match="output splits add up to 8 rows over 4 ranks, the tensor has 4"):
        distributed.all_to_all_single(
            rows(4), rows(4), output_split_sizes=[2] * WORLD, input_split_sizes=[1] * WORLD
        )


def test_tensors_without_data_leave_shapes_and_bytes(rank: int, transfers: list[Transfer]) -> None:
    output = torch.empty(WORLD * 2, 3, device="meta")
    distributed.all_gather_into_tensor(output, torch.empty(2, 3, device="meta"))
    assert [transfer.num_bytes for transfer in transfers] == [WORLD * 2 * 3 * FLOAT]


def test_the_real_world_is_divided_as_megatron_divides_it() -> None:
    from megatron.core import parallel_state

    transfers: list[Transfer] = []
    sizes = {
        **PLAIN,
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 8,
        "expert_model_parallel_size": 64,
        "embedding_pipeline_ranks": (0, 7),
    }
    with loopback_groups(world_size=1024, rank=391, sizes=sizes, on_transfer=transfers.append):
        # 391 = 3 x 128 + 7: pipeline rank 3, and within it tensor rank 1 of data rank 3
        assert parallel_state.get_pipeline_model_parallel_rank() == 3
        assert parallel_state.get_tensor_model_parallel_rank() == 1
        assert parallel_state.get_data_parallel_rank() == 3
        assert parallel_state.get_expert_model_parallel_rank() == 7
        assert parallel_state.get_data_parallel_world_size() == 64
        group = parallel_state.get_expert_data_parallel_group()
        assert (group.size(), group.group_desc) == (2, "EXPERT_DATA_PARALLEL_GROUP")
        transfers.clear()
        distributed.all_reduce(torch.ones(3), group=parallel_state.get_context_parallel_group())
        assert transfers == []  # nobody else is in it
    assert not distributed.is_initialized()


def test_a_ledger_adds_up_by_place_and_phase() -> None:
    where = ("forward", "decoder.3")
    ledger = Ledger(lambda: where)
    transfer = Transfer(op="all_to_all", group="EP", group_size=8, num_bytes=100, outputs=())
    ledger.record(transfer)
    ledger.record(transfer)
    where = ("backward", "decoder.3")
    ledger.record(transfer)
    assert ledger.lines == {
        LedgerKey("all_to_all", "EP", 8, "forward", "decoder.3"): Traffic(2, 200),
        LedgerKey("all_to_all", "EP", 8, "backward", "decoder.3"): Traffic(1, 100),
    }


def test_a_second_job_can_follow_the_first() -> None:
    for world_size in (2, 3):
        with loopback_groups(world_size=world_size, rank=1, sizes=PLAIN, on_transfer=lambda transfer: None):
            assert distributed.get_world_size() == world_size
            assert distributed.get_backend() == BACKEND
