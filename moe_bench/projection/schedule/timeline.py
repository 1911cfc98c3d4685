"""When every rank of a pipeline computes what: its slots, its idle time, and the instants of its chunks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from moe_bench.projection.schedule.graph import Node, ScheduleGraph
from moe_bench.projection.schedule.program import Work
from moe_bench.projection.schedule.repeat import Cut, moved, period_micro_batches
from moe_bench.projection.schedule.shape import ScheduleShape


@dataclass(frozen=True, slots=True, kw_only=True)
class Slot:
    """One rank at one thing."""

    rank: int
    start_s: float
    end_s: float
    work: Work

    @property
    def name(self) -> str:
        """`F3.12`: forward pass of chunk 3 for micro batch 12; merged passes are joined by a plus."""
        return "+".join(f"{one.kind}{one.chunk}.{one.micro_batch}" for one in self.work)


@dataclass(frozen=True, slots=True, kw_only=True)
class Repeat:
    """Periods of the steady state that were not simulated, for they are known (repeat.py)."""

    cut: Cut
    num_periods: int
    period_s: float

    @property
    def left_out_s(self) -> float:
        """By how much everything behind the cut is later than simulated."""
        return self.num_periods * self.period_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkInstants:
    """When one chunk begins to need its weights, and when its weight gradients are complete."""

    chunk: int
    rank: int
    first_forward_s: float
    """Start of its first forward pass."""
    last_backward_s: float
    """Start of the last slot that adds to its weight gradients."""
    gradients_s: float
    """End of that slot."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One step of the pipeline, from the first forward pass of the first rank (0 s) to the last gradient."""

    shape: ScheduleShape
    total_s: float
    busy_s: tuple[float, ...]
    """What every rank computes."""
    chunks: tuple[ChunkInstants, ...]
    max_in_flight: tuple[int, ...]
    """Forward passes of chunks that wait for their backward pass, at most, on every rank."""
    graph: ScheduleGraph
    """What was simulated: `shape`, or a shorter schedule with `repeat`."""
    starts_s: Sequence[float]
    ends_s: Sequence[float]
    repeat: Repeat | None

    @property
    def bubble_s(self) -> tuple[float, ...]:
        """Idle time of every rank, waiting for transfers included."""
        return tuple(self.total_s - busy_s for busy_s in self.busy_s)

    @property
    def bubble_fraction(self) -> float:
        """Idle share of all ranks together."""
        return 1 - sum(self.busy_s) / (self.shape.num_ranks * self.total_s)

    def slots(self, rank: int) -> Iterator[Slot]:
        """Everything that `rank` computes, in order."""
        simulated = self.graph.slots[rank]
        if self.repeat is None:
            return self._slots(rank, simulated, 0)
        cut, num_periods = self.repeat.cut, self.repeat.num_periods
        before = cut.num_before[rank]
        return chain(
            self._slots(rank, simulated[:before], 0),
            *(
                self._slots(rank, simulated[before - cut.num_slots : before], period)
                for period in range(1, num_periods + 1)
            ),
            self._slots(rank, simulated[before:], num_periods),
        )

    def _slots(self, rank: int, slots: Sequence[Node], num_periods_later: int) -> Iterator[Slot]:
        later_s = 0.0 if self.repeat is None else num_periods_later * self.repeat.period_s
        num_later = num_periods_later * period_micro_batches(self.shape)
        for slot in slots:
            yield Slot(
                rank=rank,
                start_s=self.starts_s[slot.first] + later_s,
                end_s=self.ends_s[slot.last] + later_s,
                work=moved(slot.work, num_later) if num_later else slot.work,
            )
