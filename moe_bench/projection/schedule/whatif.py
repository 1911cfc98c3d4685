"""Orders of work that Megatron-Core does not have: zero-bubble and DualPipe-like schedules.

Each is the published order, not a search; transfers run beside compute.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from moe_bench.projection.schedule.program import Work
from moe_bench.projection.schedule.shape import Pass, PassKind, ScheduleKind, ScheduleShape


def what_if_order(shape: ScheduleShape, rank: int) -> tuple[Work, ...]:
    """Every slot of `rank`."""
    written = _Written(chunks=shape.chunks_of(rank))
    if shape.kind is ScheduleKind.ZERO_BUBBLE_H1:
        _zero_bubble_h1(written, shape, rank)
    elif shape.kind is ScheduleKind.ZERO_BUBBLE_V:
        _zero_bubble_v(written, shape, rank)
    else:
        _dual_pipe_v(written, shape, rank)
    return tuple(written.order)


@dataclass(slots=True, kw_only=True)
class _Written:
    """An order being written down; every (kind, chunk) counts its own micro batches."""

    chunks: tuple[int, ...]
    """Those of the rank; below they are called by their place here."""
    order: list[Work] = field(default_factory=list)
    counts: dict[tuple[PassKind, int], int] = field(default_factory=dict)
    waiting: deque[Pass] = field(default_factory=deque)
    """Weight gradients that are put off."""

    def forward(self, place: int = 0) -> None:
        self.order.append((self._next(PassKind.FORWARD, place),))

    def backward(self, place: int = 0, *, is_split: bool = False) -> None:
        """Both gradients, or that of the input, which puts the other one off."""
        one = self._next(PassKind.BACKWARD, place)
        if is_split:
            self.waiting.append(one._replace(kind=PassKind.WGRAD))
            one = one._replace(kind=PassKind.DGRAD)
        self.order.append((one,))

    def merged(self, forward_place: int, backward_place: int) -> None:
        self.order.append(
            (self._next(PassKind.FORWARD, forward_place), self._next(PassKind.BACKWARD, backward_place))
        )

    def weights(self) -> None:
        """The weight gradient that has waited longest."""
        self.order.append((self.waiting.popleft(),))

    def num_done(self, kind: PassKind, place: int = 0) -> int:
        return self.counts.get((kind, place), 0)

    def _next(self, kind: PassKind, place: int) -> Pass:
        micro_batch = self.num_done(kind, place)
        self.counts[kind, place] = micro_batch + 1
        return Pass(kind, self.chunks[place], micro_batch)


def _zero_bubble_h1(written: _Written, shape: ScheduleShape, rank: int) -> None:
    """arXiv:2401.10241, figure 3 top: 1F1B whose rank r is always r weight gradients behind.

    Rank r holds PP - r micro batches in flight and r put off, so no rank holds more than the first does.
    """
    num_warm_up = min(shape.num_ranks - rank - 1, shape.num_micro_batches)
    for _ in range(num_warm_up):
        written.forward()
    for index in range(shape.num_micro_batches):
        if index < shape.num_micro_batches - num_warm_up:
            written.forward()
        written.backward(is_split=True)
        if index >= rank:
            written.weights()
    while written.waiting:
        written.weights()


def _zero_bubble_v(written: _Written, shape: ScheduleShape, rank: int) -> None:
    """arXiv:2405.15362, ZB-V by hand, in the order of torch.distributed's ScheduleZBVZeroBubble."""
    ranks, batches = shape.num_ranks, shape.num_micro_batches
    for _ in range(2 * (ranks - rank) - 1):
        written.forward(0)
    for _ in range(rank):
        written.forward(1)
        written.forward(0)
    for _ in range(ranks - rank):
        written.forward(1)
        _split_at_once(written, 1)
    while written.num_done(PassKind.FORWARD, 1) < batches:
        if written.num_done(PassKind.FORWARD, 0) < batches:
            written.forward(0)
        _split_at_once(written, 0)
        written.forward(1)
        _split_at_once(written, 1)
    for _ in range(rank):
        written.backward(0, is_split=True)
        written.backward(1, is_split=True)
    _flush_v(written, ranks - rank)


def _split_at_once(written: _Written, place: int) -> None:
    """The two halves of a backward pass, one behind the other; the first half travels meanwhile."""
    written.backward(place, is_split=True)
    written.weights()


def _flush_v(written: _Written, num_left: int) -> None:
    """The last input gradients of chunk 0, each with a weight gradient of that chunk, then the rest."""
    for _ in range(num_left):
        written.backward(0, is_split=True)
        first = next(one for one in written.waiting if one.chunk == written.chunks[0])
        written.waiting.remove(first)
        written.order.append((first,))
    for one in sorted(written.waiting, key=lambda one: -one.chunk):
        written.order.append((one,))
    written.waiting.clear()


def _dual_pipe_v(written: _Written, shape: ScheduleShape, rank: int) -> None:
    """DeepSeek's dualpipev.py (github.com/deepseek-ai/DualPipe), step by step."""
    after, ranks = shape.num_ranks - rank - 1, shape.num_ranks
    for _ in range(2 * after):
        written.forward(0)
    for _ in range(rank + 1):
        written.forward(0)
        written.forward(1)
    for _ in range(after):
        _split_at_once(written, 1)
        written.forward(1)
    for index in range(shape.num_micro_batches - 2 * ranks + rank + 1):
        if index == 0 and after == 0:
            written.forward(0)
            written.backward(1)
        else:
            written.merged(0, 1)
        written.merged(1, 0)
    for _ in range(after):
        written.backward(1)
        written.merged(1, 0)
    for index in range(2 * (rank + 1)):  # the second half puts its weight gradients off
        written.backward(1 - index % 2, is_split=index > rank)
    for _ in range(after):
        written.weights()
        written.backward(0, is_split=True)
    while written.waiting:
        written.weights()
