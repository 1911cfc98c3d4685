"""What one pipeline rank does, in order: it computes passes, posts transfers and waits for transfers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from moe_bench.projection.schedule_shape import Pass, PassKind, ScheduleShape

Work = tuple[Pass, ...]
"""What one slot computes: one pass, or a forward and a backward pass merged."""


class Tensor(NamedTuple):
    """What travels: the activation behind a chunk, or the gradient in front of it."""

    is_activation: bool
    chunk: int
    """The chunk that made it."""
    micro_batch: int


class Compute(NamedTuple):
    """Compute `work` once the tensors that it reads have come."""

    work: Work


class Post(NamedTuple):
    """Start to send and to receive; a transfer moves once both of its ends are posted."""

    sends: tuple[Tensor, ...]
    receives: tuple[Tensor, ...]


class Wait(NamedTuple):
    """Go on when these transfers are complete."""

    tensors: tuple[Tensor, ...]


Instruction = Compute | Post | Wait


def tensor_read(shape: ScheduleShape, one: Pass) -> Tensor | None:
    """What `one` reads from another rank, if anything."""
    if one.kind is PassKind.WGRAD:
        return None
    is_forward = one.kind is PassKind.FORWARD
    return _travelling(shape, is_forward, one.chunk - 1 if is_forward else one.chunk + 1, one)


def tensor_made(shape: ScheduleShape, one: Pass) -> Tensor | None:
    """What another rank reads of `one`, if anything."""
    if one.kind is PassKind.WGRAD:
        return None
    is_forward = one.kind is PassKind.FORWARD
    reader = one.chunk + 1 if is_forward else one.chunk - 1
    if not 0 <= reader < shape.num_chunks or shape.rank_of(reader) == shape.rank_of(one.chunk):
        return None
    return Tensor(is_forward, one.chunk, one.micro_batch)


def exchange(sends: Iterable[Tensor | None], receives: Iterable[Tensor | None]) -> list[Instruction]:
    """Post, and wait for all of it: Megatron-Core's P2PCommunicator without `overlap_p2p_comm`."""
    sent, received = existing(sends), existing(receives)
    return [Post(sent, received), Wait(sent + received)] if sent + received else []


def eager_program(shape: ScheduleShape, order: Sequence[Work]) -> tuple[Instruction, ...]:
    """Transfers beside compute: every receive is posted from the start, a send as soon as there is one."""
    program: list[Instruction] = [
        Post((), existing(tensor_read(shape, one) for work in order for one in work))
    ]
    for work in order:
        program.append(Compute(work))
        sends = existing(tensor_made(shape, one) for one in work)
        if sends:
            program.append(Post(sends, ()))
    return tuple(program)


def existing(tensors: Iterable[Tensor | None]) -> tuple[Tensor, ...]:
    """Those that are not None."""
    return tuple(tensor for tensor in tensors if tensor is not None)


def _travelling(shape: ScheduleShape, is_activation: bool, maker: int, reader: Pass) -> Tensor | None:
    if not 0 <= maker < shape.num_chunks or shape.rank_of(maker) == shape.rank_of(reader.chunk):
        return None
    return Tensor(is_activation, maker, reader.micro_batch)
