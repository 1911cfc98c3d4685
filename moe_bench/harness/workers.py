"""Ranks as processes forked from one parent that has imported everything: watched, and always ended."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.context import ForkContext, ForkProcess
from pathlib import Path
from typing import Any, Literal

from moe_bench.errors import BadInputError, MeasurementError, MissingRequirementError, MoeBenchError
from moe_bench.results.workers import end_with_parent
from moe_bench.spec.rendezvous import Rendezvous

LOOPBACK = "127.0.0.1"
GATHER_CAUSES_S = 1.0
"""How long to wait, once a rank has failed, for one that failed before it: peers of a dead rank fail too."""
END_S = 10.0
"""How long a killed process may take to go."""

STDERR = 2
"""File descriptor of the standard error (POSIX)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What a rank tells its parent."""

    kind: Literal["step", "progress", "result", "error"]
    content: Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Seat:
    """A forked rank's place in the job, and its line to the parent."""

    rendezvous: Rendezvous
    listen_fd: int
    """Socket on which rank 0 serves the rendezvous; open in all ranks."""
    send: Callable[[Message], None]


@dataclass(slots=True, kw_only=True)
class _Rank:
    rank: int
    process: ForkProcess
    messages: connection.Connection
    stderr: Path
    step: int = 0
    """Step that it is in, counted from 1; 0 before the first."""
    results: list[Any] = field(default_factory=list)
    failure: MoeBenchError | None = None
    is_done: bool = False


def run_forked[Result](
    num_ranks: int, work: Callable[[Seat], Result], *, on_progress: Callable[[Any], None]
) -> list[Result]:
    """Run `work` in `num_ranks` forked processes and return what each returned, in the order of ranks.

    Raises what a rank raised if that was a MoeBenchError, MeasurementError if one died or failed otherwise; a
    note on the error holds what the rank wrote to its standard error, which is shown nowhere else. No process
    is left when this returns or raises. The caller must have one thread only and must have run no tensor
    operation: a fork copies neither threads nor the state that they share.
    """
    if threading.active_count() > 1:
        raise RuntimeError("ranks must be forked before this process starts its first thread")
    ranks: list[_Rank] = []
    with (
        tempfile.TemporaryDirectory(prefix="moe_bench-") as folder,
        socket.create_server((LOOPBACK, 0)) as server,
        _ended(ranks),
    ):
        for rank in range(num_ranks):
            ranks.append(_fork(server, rank, num_ranks, work, Path(folder) / f"{rank}.stderr"))
        _watch(ranks, on_progress)
        return [rank.results[0] for rank in ranks]


def _fork(
    server: socket.socket, rank: int, num_ranks: int, work: Callable[[Seat], Any], stderr: Path
) -> _Rank:
    context: ForkContext = multiprocessing.get_context("fork")
    messages, outlet = context.Pipe(duplex=False)
    seat = Seat(
        rendezvous=Rendezvous(
            rank=rank,
            world_size=num_ranks,
            local_rank=rank,
            master_addr=LOOPBACK,
            master_port=server.getsockname()[1],
        ),
        listen_fd=server.fileno(),
        send=outlet.send,
    )
    # no daemon, for those may not start processes, as Megatron-Core's checkpoint writer does
    process = context.Process(target=_rank_main, args=(seat, work, stderr), name=f"rank {rank}")
    process.start()
    outlet.close()
    return _Rank(rank=rank, process=process, messages=messages, stderr=stderr)


def _rank_main(seat: Seat, work: Callable[[Seat], Any], stderr: Path) -> None:
    """Body of a rank: its result or its failure goes to the parent."""
    # A rank that outlives its parent would wait for its peers until gloo's time is up.
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stderr.open("wb") as file:
        # The descriptor, not the Python object: torch's C++ parts write there too.
        os.dup2(file.fileno(), STDERR)
    # A crash in C++ code then says where Python stood.
    faulthandler.enable(STDERR)
    try:
        result = work(seat)
    except MoeBenchError as error:
        seat.send(Message(kind="error", content=error))
    else:
        seat.send(Message(kind="result", content=result))


def _watch(ranks: list[_Rank], on_progress: Callable[[Any], None]) -> None:
    while waiting := [rank for rank in ranks if not rank.is_done]:
        connection.wait([source for rank in waiting for source in (rank.messages, rank.process.sentinel)])
        for rank in waiting:
            _read(rank, on_progress)
        if any(rank.failure for rank in ranks):
            _raise_first_cause(ranks, on_progress)


def _read(rank: _Rank, on_progress: Callable[[Any], None]) -> None:
    """Take in what a rank has sent, and notice if it has died."""
    has_ended = not rank.process.is_alive()
    while rank.messages.poll():
        try:
            message: Message = rank.messages.recv()
        except EOFError:
            break
        if message.kind == "step":
            rank.step = message.content
        elif message.kind == "progress":
            on_progress(message.content)
        elif message.kind == "error":
            rank.failure = message.content
        else:
            rank.results.append(message.content)
    rank.is_done = bool(rank.results) or rank.failure is not None or has_ended
    if has_ended and not rank.results and rank.failure is None:
        rank.failure = _death(rank)


def _death(rank: _Rank) -> MeasurementError:
    """Name of an end without a result: a signal, or the last line of the traceback."""
    where = f"in step {rank.step}" if rank.step else "before the first step"
    code = rank.process.exitcode
    if code is not None and code < 0:
        return MeasurementError(f"rank {rank.rank} died {where} (signal {-code})")
    lines = rank.stderr.read_text(errors="replace").strip().splitlines()
    return MeasurementError(f"rank {rank.rank} died {where} ({lines[-1] if lines else f'exit code {code}'})")


def _raise_first_cause(ranks: list[_Rank], on_progress: Callable[[Any], None]) -> None:
    """Of the failures that come in together, raise the one that explains the others."""
    deadline_s = time.monotonic() + GATHER_CAUSES_S
    while (left_s := deadline_s - time.monotonic()) > 0:
        waiting = [rank for rank in ranks if not rank.is_done]
        if not waiting:
            break
        connection.wait([rank.process.sentinel for rank in waiting], timeout=left_s)
        for rank in waiting:
            _read(rank, on_progress)
    first = min((rank for rank in ranks if rank.failure is not None), key=_how_secondary)
    if first.failure is not None:
        if isinstance(first.failure, BadInputError | MissingRequirementError):
            raise first.failure  # what libraries printed tells a user nothing about it
        first.failure.add_note(first.stderr.read_text(errors="replace"))
        raise first.failure


def _how_secondary(rank: _Rank) -> int:
    """0 for a killed rank, 1 for one that named its failure, 2 for one that broke down, as its peers do."""
    code = rank.process.exitcode
    if code is not None and code < 0:
        return 0
    return 1 if code in (None, 0) else 2


@contextlib.contextmanager
def _ended(ranks: list[_Rank]) -> Iterator[None]:
    """Whatever happens in the block, leave no process behind."""
    try:
        yield
    finally:
        all_done = all(rank.is_done and rank.failure is None for rank in ranks)
        for rank in ranks:
            if not all_done:
                rank.process.kill()
            rank.process.join(END_S)
            if rank.process.is_alive():
                rank.process.kill()
                rank.process.join(END_S)
            rank.messages.close()
