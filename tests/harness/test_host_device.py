"""Stand-ins for CUDA and NCCL: what is asked of a GPU happens on the CPU, and everything is put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed.fsdp.src.megatron_fsdp import param_and_grad_buffer as fsdp_buffers
from torch import distributed

from moe_bench.harness.host_device import HostStream, host_device
from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.workers import Seat
from tests.harness.zygote import Zygote

SIZES = {"embedding_pipeline_ranks": (0,)}
UNEVEN = (1, 3)
"""Rows that each of two ranks holds."""


def test_tensors_asked_for_on_a_gpu_are_made_on_the_host() -> None:
    with host_device():
        made = [
            torch.zeros(2, device="cuda"),
            torch.zeros(2, device="cuda:1"),
            torch.zeros(2, device=torch.device("cuda")),
            torch.zeros(2, device=torch.cuda.current_device()),
            torch.zeros(2).cuda(),
            torch.zeros(2).to("cuda"),
            torch.zeros(2).to(torch.device("cuda", 0)),
            torch.zeros(2, pin_memory=True).cuda(non_blocking=True),
        ]
    assert {tensor.device.type for tensor in made} == {"cpu"}


def test_streams_and_events_are_always_done() -> None:
    with host_device():
        side, event = torch.cuda.Stream(), torch.cuda.Event()
        with torch.cuda.stream(side):
            event.record(side)
        side.wait_stream(torch.cuda.current_stream())
        torch.cuda.current_stream().wait_event(event)
        torch.cuda.synchronize()
        assert side.query()
        assert event.query()


def test_the_random_state_of_the_gpu_is_the_hosts() -> None:
    with host_device():
        torch.cuda.manual_seed(5)
        state = torch.cuda.get_rng_state()
        first = torch.rand(3)
        torch.cuda.set_rng_state(state)
        assert torch.equal(torch.rand(3), first)


def test_compiled_functions_run_eagerly() -> None:
    seen = []

    @torch.compile  # type: ignore[untyped-decorator]
    def doubled(x: torch.Tensor) -> torch.Tensor:
        seen.append(type(x))
        return 2 * x

    with host_device():
        assert doubled(torch.ones(1)).item() == 2
    assert seen == [torch.Tensor]


def test_everything_is_put_back_afterwards() -> None:
    names = ("Stream", "Event", "current_device", "current_stream", "synchronize", "get_rng_state")
    before = [getattr(torch.cuda, name) for name in names]
    collectives = (distributed.all_gather, distributed.reduce_scatter, distributed.all_to_all_single)
    with host_device():
        assert torch.cuda.Stream is HostStream
    assert [getattr(torch.cuda, name) for name in names] == before
    assert (distributed.all_gather, distributed.reduce_scatter, distributed.all_to_all_single) == collectives
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(1, device="cuda")


def uneven_collectives(seat: Seat) -> dict[str, Any]:
    """Rank r holds UNEVEN[r] rows, each of them full of r + 1."""
    with (
        host_device(),
        process_groups(seat.rendezvous, backend="gloo", sizes=SIZES, listen_fd=seat.listen_fd),
    ):
        rank = seat.rendezvous.rank
        mine = torch.full((UNEVEN[rank], 2), rank + 1.0)
        gathered = [torch.empty(rows, 2) for rows in UNEVEN]
        distributed.all_gather(gathered, mine)
        reduced = torch.empty(UNEVEN[rank], 2)
        distributed.reduce_scatter(reduced, [torch.full((rows, 2), rank + 1.0) for rows in UNEVEN])
        # rank 0 sends both of its rows to rank 1, which sends one row each way
        sent = [torch.tensor([0, 2]), torch.tensor([1, 1])][rank]
        received = [torch.tensor([0, 1]), torch.tensor([2, 1])][rank]
        exchanged = torch.empty(int(received.sum()), 1)
        distributed.all_to_all_single(exchanged, torch.full((2, 1), rank + 1.0), received, sent)
        return {
            "gathered": [part[:, 0].tolist() for part in gathered],
            "reduced": reduced[:, 0].tolist(),
            "exchanged": exchanged[:, 0].tolist(),
        }


def test_gloo_takes_unequal_parts_and_splits_given_as_tensors(zygote: Zygote) -> None:
    first, second = zygote.fork(2, uneven_collectives)
    assert first == {"gathered": [[1], [2, 2, 2]], "reduced": [3], "exchanged": [2]}
    assert second == {"gathered": [[1], [2, 2, 2]], "reduced": [3, 3, 3], "exchanged": [1, 1, 2]}


def coalesced_gather(seat: Seat) -> bool:
    with (
        host_device(),
        process_groups(seat.rendezvous, backend="gloo", sizes=SIZES, listen_fd=seat.listen_fd),
    ):
        gathered = torch.zeros(2)
        with fsdp_buffers._coalescing_manager(distributed.group.WORLD, async_ops=True) as works:
            distributed.all_gather_into_tensor(
                gathered, torch.tensor([seat.rendezvous.rank + 1.0]), async_op=True
            )
        is_done = all(work.is_completed() for work in works.works)
        return is_done and gathered.tolist() == [1.0, 2.0]


def test_coalesced_collectives_are_done_when_their_block_ends(zygote: Zygote) -> None:
    assert zygote.fork(2, coalesced_gather) == [True, True]
