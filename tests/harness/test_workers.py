"""Forked ranks: results in order, the cause of a failure named, and no process left."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import psutil
import pytest

from moe_bench.errors import MeasurementError
from moe_bench.harness.workers import Message, Seat, run_forked
from tests.harness.zygote import Zygote

FOR_EVER_S = 3600


def place(seat: Seat) -> tuple[int, int, int]:
    return seat.rendezvous.rank, seat.rendezvous.world_size, seat.rendezvous.local_rank


def killed_in_step_two(seat: Seat) -> None:
    seat.send(Message(kind="step", content=2))
    if seat.rendezvous.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(FOR_EVER_S)


def broken_down(seat: Seat) -> None:
    if seat.rendezvous.rank == 0:
        raise ZeroDivisionError("the first rank divides by nothing")
    time.sleep(FOR_EVER_S)


def refused_while_peers_break_down(seat: Seat) -> None:
    if seat.rendezvous.rank == 2:
        raise MeasurementError("rank 2: loss is nan in step 1")
    raise ConnectionResetError("peer is gone")


def large_result(seat: Seat) -> bytes:
    return bytes(4_000_000)


def reports(num_ranks: int) -> list[Any]:
    seen: list[Any] = []
    run_forked(num_ranks, report_step, on_progress=seen.append)
    return seen


def report_step(seat: Seat) -> None:
    if seat.rendezvous.rank == 1:
        for step in range(3):
            seat.send(Message(kind="progress", content=f"step {step}"))


def num_children() -> int:
    return len(psutil.Process().children(recursive=True))


def test_results_come_in_the_order_of_ranks(zygote: Zygote) -> None:
    assert zygote.fork(3, place) == [(0, 3, 0), (1, 3, 1), (2, 3, 2)]


def test_a_result_larger_than_a_pipe_arrives(zygote: Zygote) -> None:
    assert [len(result) for result in zygote.fork(2, large_result)] == [4_000_000, 4_000_000]


def test_progress_reaches_the_parent_in_order(zygote: Zygote) -> None:
    assert zygote.call(reports, 2) == ["step 0", "step 1", "step 2"]


def test_a_killed_rank_is_named_with_step_and_signal_and_its_peers_are_ended(zygote: Zygote) -> None:
    with pytest.raises(MeasurementError, match=r"^rank 1 died in step 2 \(signal 9\)$"):
        zygote.fork(3, killed_in_step_two)
    assert zygote.call(num_children) == 0


def test_a_rank_that_breaks_down_is_named_with_the_last_line_of_its_traceback(zygote: Zygote) -> None:
    words = "rank 0 died before the first step (ZeroDivisionError: the first rank divides by nothing)"
    with pytest.raises(MeasurementError) as caught:
        zygote.fork(2, broken_down)
    assert str(caught.value) == words
    assert "Traceback (most recent call last)" in caught.value.__notes__[0]
    assert zygote.call(num_children) == 0


def test_a_failure_with_a_name_goes_before_the_breakdowns_that_follow_from_it(zygote: Zygote) -> None:
    with pytest.raises(MeasurementError, match=r"^rank 2: loss is nan in step 1"):
        zygote.fork(4, refused_while_peers_break_down)


def asleep(seat: Seat) -> None:
    time.sleep(FOR_EVER_S)


def test_ranks_do_not_outlive_a_killed_parent() -> None:
    zygote = Zygote()
    zygote.send(run_forked, 2, asleep, on_progress=print)
    parent = psutil.Process(zygote.pid)
    while len(ranks := parent.children()) < 2:
        assert parent.status() != psutil.STATUS_ZOMBIE, "it ended before it had ranks"
        time.sleep(0.01)
    parent.kill()
    zygote.close()
    assert psutil.wait_procs(ranks, timeout=30)[1] == []
