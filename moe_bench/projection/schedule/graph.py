"""A schedule as a graph in topological order: when everything starts follows from one pass over it.

Since the order of work on every rank is fixed, nothing is decided while time runs: an instant is the latest
of at most two earlier ones plus a duration, and the step is the longest path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from moe_bench.projection.schedule.megatron import TransferRule, rank_order, rank_program
from moe_bench.projection.schedule.program import (
    Compute,
    Instruction,
    Links,
    Post,
    Tensor,
    Wait,
    Work,
    eager_program,
    existing,
    links_of,
)
from moe_bench.projection.schedule.shape import Pass, PassKind, ScheduleKind, ScheduleShape
from moe_bench.projection.schedule.whatif import what_if_order

NOTHING, TRANSFER = 0, 1
"""Durations of nodes that compute nothing: a meeting of two instants, and a transfer."""
_MEGATRON = (
    ScheduleKind.NO_PIPELINE,
    ScheduleKind.ONE_F_ONE_B,
    ScheduleKind.INTERLEAVED,
    ScheduleKind.INTERLEAVED_EP_OVERLAP,
)
_HELD = {PassKind.FORWARD: 1, PassKind.BACKWARD: -1, PassKind.DGRAD: 0, PassKind.WGRAD: -1}
"""What a pass adds to the chunks in flight."""
_START = 0
"""The node at which the step begins."""


class Part(NamedTuple):
    """What a duration is of: a slot, or of a merged one what it computes before or behind its sends."""

    work: Work
    """With micro batch 0."""
    is_behind_sends: bool


class Node(NamedTuple):
    """A slot in the graph; a merged one is two nodes, up to its sends and behind them."""

    first: int
    last: int
    work: Work


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleGraph:
    """Nodes in an order in which every node stands behind what it waits for."""

    shape: ScheduleShape
    before: tuple[int, ...]
    """The node on the same rank that a node follows."""
    other: tuple[int, ...]
    """Another node that it waits for, or the same once more."""
    duration: tuple[int, ...]
    """Place in the list of durations."""
    parts: tuple[Part, ...]
    """What the durations from TRANSFER + 1 on are of."""
    slots: tuple[tuple[Node, ...], ...]
    """Of every rank, in order."""
    first_forward: tuple[int, ...]
    """Place, among the slots of its rank, of the first forward pass of every chunk."""
    last_gradient: tuple[int, ...]
    """Place of the last slot of every chunk that adds to its weight gradients."""
    counts: tuple[tuple[tuple[int, int], ...], ...]
    """Of every rank: how many of its slots have which duration."""
    max_in_flight: tuple[int, ...]
    """Most chunks of every rank whose forward pass is done and whose backward pass is not."""

    def chunk_ends(self) -> Iterator[tuple[Node, Node]]:
        """Of every chunk: its first forward pass, and the last slot that adds to its weight gradients."""
        for chunk, places in enumerate(zip(self.first_forward, self.last_gradient, strict=True)):
            first, last = (self.slots[self.shape.rank_of(chunk)][place] for place in places)
            yield first, last


def orders(shape: ScheduleShape) -> tuple[tuple[Work, ...], ...]:
    """What every rank computes, in order."""
    one = rank_order if shape.kind in _MEGATRON else what_if_order
    return tuple(one(shape, rank) for rank in range(shape.num_ranks))


def programs(shape: ScheduleShape, rule: TransferRule) -> tuple[tuple[Instruction, ...], ...]:
    """What every rank computes, posts and waits for, in order."""
    if shape.kind in _MEGATRON:
        return tuple(rank_program(shape, rank, rule) for rank in range(shape.num_ranks))
    links = links_of(shape)
    return tuple(eager_program(links, order) for order in orders(shape))


@lru_cache(maxsize=128)
def schedule_graph(shape: ScheduleShape, rule: TransferRule) -> ScheduleGraph:
    """The graph of `shape`. Kept, for a search asks for few shapes with many chunk times."""
    building = _Building(shape=shape, links=links_of(shape), ranks=[_Rank() for _ in range(shape.num_ranks)])
    all_programs = programs(shape, rule)
    reached = [0] * shape.num_ranks
    moving = True
    while moving:
        moving = False
        for rank, program in enumerate(all_programs):
            while reached[rank] < len(program) and building.run(rank, program[reached[rank]]):
                reached[rank] += 1
                moving = True
    stuck = [rank for rank, program in enumerate(all_programs) if reached[rank] < len(program)]
    if stuck:
        raise RuntimeError(f"{shape}: ranks {stuck} wait for each other; the order of work is wrong")
    return building.finished()


def evaluate(graph: ScheduleGraph, durations_s: Sequence[float]) -> tuple[list[float], list[float]]:
    """Start and end of every node, the step beginning at 0.

    start = max(end of `before`, end of `other`); end = start + duration.
    """
    starts_s, ends_s = [0.0], [0.0]
    start, end = starts_s.append, ends_s.append
    for before, other, index in zip(graph.before, graph.other, graph.duration, strict=True):
        instant, late = ends_s[before], ends_s[other]
        if late > instant:
            instant = late
        start(instant)
        end(instant + durations_s[index])
    return starts_s, ends_s


def duration_counts(slots: Sequence[Node], duration: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Which durations the nodes of `slots` have, and how often."""
    nodes = (node for slot in slots for node in range(slot.first, slot.last + 1))
    return tuple(Counter(duration[node - 1] for node in nodes).items())


def _most_in_flight(slots: Sequence[Node]) -> int:
    """A split backward pass holds its chunk until both halves are done. Merged passes run layer by layer
    beside one another, so what one adds the other frees (analysis/overlap_memory.py).
    """
    live = most = 0
    for slot in slots:
        live += sum(_HELD[one.kind] for one in slot.work)
        most = max(most, live)
    return most


@dataclass(slots=True, kw_only=True)
class _Rank:
    """How far one rank has come."""

    last: int = _START
    sent_behind: int = _START
    """Where the last slot has made what it sends."""
    awaited: set[Tensor] = field(default_factory=set)
    """Transfers that it has waited for."""
    slots: list[Node] = field(default_factory=list)


@dataclass(slots=True, kw_only=True)
class _Building:
    """A graph that grows; node 0 is the start of the step and stands in none of the lists."""

    shape: ScheduleShape
    links: Links
    ranks: list[_Rank]
    before: list[int] = field(default_factory=list)
    other: list[int] = field(default_factory=list)
    duration: list[int] = field(default_factory=list)
    durations: dict[tuple[bool, *tuple[tuple[PassKind, int], ...]], int] = field(default_factory=dict)
    ends_posted: dict[Tensor, int] = field(default_factory=dict)
    """Node behind which the first of a transfer's two ends is posted."""
    transfers: dict[Tensor, int] = field(default_factory=dict)

    def run(self, rank: int, instruction: Instruction) -> bool:
        """Add what `instruction` means; False if it waits for something that is not there yet."""
        match instruction:
            case Post(sends=sends, receives=receives, is_early=is_early):
                at = self.ranks[rank].sent_behind if is_early else self.ranks[rank].last
                for tensor in sends + receives:
                    self._post(tensor, at)
                return True
            case Wait(is_beside=True):
                return True
            case Wait(tensors=tensors):
                return self._wait(self.ranks[rank], tensors)
            case Compute(work=work):
                return self._compute(self.ranks[rank], work)

    def finished(self) -> ScheduleGraph:
        first_forward, last_gradient = [0] * self.shape.num_chunks, [0] * self.shape.num_chunks
        for rank in self.ranks:
            for place, slot in enumerate(rank.slots):
                for one in slot.work:
                    if one.kind is PassKind.FORWARD and one.micro_batch == 0:
                        first_forward[one.chunk] = place
                    elif one.kind in (PassKind.BACKWARD, PassKind.WGRAD):
                        last_gradient[one.chunk] = place
        return ScheduleGraph(
            shape=self.shape,
            before=tuple(self.before),
            other=tuple(self.other),
            duration=tuple(self.duration),
            parts=tuple(
                Part(tuple(Pass(kind, chunk, 0) for kind, chunk in work), is_behind_sends)
                for is_behind_sends, *work in self.durations
            ),
            slots=tuple(tuple(rank.slots) for rank in self.ranks),
            first_forward=tuple(first_forward),
            last_gradient=tuple(last_gradient),
            counts=tuple(duration_counts(rank.slots, self.duration) for rank in self.ranks),
            max_in_flight=tuple(_most_in_flight(rank.slots) for rank in self.ranks),
        )

    def _post(self, tensor: Tensor, node: int) -> None:
        other_end = self.ends_posted.pop(tensor, None)
        if other_end is None:
            self.ends_posted[tensor] = node
        else:
            self.transfers[tensor] = self._add(node, other_end, TRANSFER)

    def _wait(self, rank: _Rank, tensors: Iterable[Tensor]) -> bool:
        nodes = self._nodes_to_wait_for(rank, tensors)
        if nodes is None:
            return False
        for node in nodes:
            rank.last = self._add(rank.last, node, NOTHING)
        rank.awaited.update(tensors)
        return True

    def _compute(self, rank: _Rank, work: Work) -> bool:
        reads = existing([self.links.tensor_read(one) for one in work])
        nodes = self._nodes_to_wait_for(rank, reads)
        if nodes is None:
            return False
        rank.awaited.update(reads)
        for node in nodes[1:]:
            rank.last = self._add(rank.last, node, NOTHING)
        first = self._add(rank.last, nodes[0] if nodes else rank.last, self._duration(work, False))
        rank.last = rank.sent_behind = first
        if len(work) > 1:
            rank.last = self._add(first, first, self._duration(work, True))
        rank.slots.append(Node(first, rank.last, work))
        return True

    def _duration(self, work: Work, is_behind_sends: bool) -> int:
        passes = tuple((one.kind, one.chunk) for one in work)
        key: tuple[bool, *tuple[tuple[PassKind, int], ...]] = (is_behind_sends, *passes)
        return self.durations.setdefault(key, TRANSFER + 1 + len(self.durations))

    def _nodes_to_wait_for(self, rank: _Rank, tensors: Iterable[Tensor]) -> list[int] | None:
        """The transfers that `rank` has not waited for yet; None if one of them is not posted by now."""
        nodes = []
        for tensor in tensors:
            if tensor not in rank.awaited:
                node = self.transfers.get(tensor)
                if node is None:
                    return None
                nodes.append(node)
        return nodes

    def _add(self, before: int, other: int, duration: int) -> int:
        self.before.append(before)
        self.other.append(other)
        self.duration.append(duration)
        return len(self.before)
