"""The fullest moment of a step on one pipeline rank: chunks in flight, what stages exchange, what lingers.

Megatron-Core 0.19.2, pipeline_parallel/schedules.py. A vector is what pipeline neighbours exchange, a t H.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from moe_bench.analysis.chunk_memory import ChunkMemory
from moe_bench.analysis.live_tensors import NOTHING, Held, Instant
from moe_bench.analysis.overlap_memory import overlapped_instant
from moe_bench.spec.recipe import Recipe

Phase = Literal["forward", "backward"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPeak:
    """The most that a rank holds beside its states."""

    held: Held
    pipeline_bytes: int
    """Received from neighbours."""
    phase: Phase
    place: str

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.held.total_bytes + self.pipeline_bytes


def step_peak(recipe: Recipe, chunks: Sequence[ChunkMemory], *, vector_bytes: int) -> StepPeak:
    """The fullest moment among the forward and backward passes of `chunks`, the model chunks of one rank."""
    if recipe.parallel.virtual_pipeline > 1:
        return _interleaved(recipe, chunks, vector_bytes)
    peaks = _one_forward_one_backward(recipe, chunks[0], vector_bytes)
    return max(peaks, key=lambda peak: peak.total_bytes)


def _one_forward_one_backward(recipe: Recipe, chunk: ChunkMemory, vector_bytes: int) -> Iterator[StepPeak]:
    """min(m, PP - rank) micro batches in flight (forward_backward_pipelining_without_interleaving).

    Once the first backward pass is through, its variables stay until they are set again: the output's graph,
    with the input and that one's gradient, until the next forward pass has ended, the gradient of the output
    until the next one arrives.
    """
    num = min(recipe.num_micro_batches, recipe.parallel.pipeline - chunk.chunk.pipeline_rank)
    is_steady = recipe.num_micro_batches > num
    received = 0 if chunk.chunk.has_embedding else vector_bytes
    sent = 0 if chunk.chunk.has_loss else vector_bytes
    left_over = received * is_steady
    others = Held((num - 1) * (chunk.kept_bytes - received) - received, 0, left_over)
    yield StepPeak(
        held=chunk.forward.held.beside(others),
        pipeline_bytes=num * received + left_over + sent * is_steady,
        phase="forward",
        place=chunk.forward.place,
    )
    yield StepPeak(
        held=chunk.first_backward.held.beside(others).beside(Held(0, 0, -sent)),
        pipeline_bytes=num * received + sent,
        phase="backward",
        place=chunk.first_backward.place,
    )
    if recipe.overlap.expert_parallel and is_steady:
        both = overlapped_instant(chunk, chunk, vector_bytes=vector_bytes)
        yield StepPeak(held=both.held, pipeline_bytes=0, phase="backward", place=both.place)


def _interleaved(recipe: Recipe, chunks: Sequence[ChunkMemory], vector_bytes: int) -> StepPeak:
    """The interleaved schedule, pass by pass, over three groups of micro batches at most.

    Warm-up: 2 (PP - rank - 1) + (VPP - 1) G forward passes of chunks, in groups of G micro batches per chunk,
    one more where expert parallelism overlaps; then one forward and one backward pass in turn
    (get_pp_rank_microbatches, get_schedule_table). The third group is the first whose passes all alternate.
    """
    parallel = recipe.parallel
    rank, num_chunks = chunks[0].chunk.pipeline_rank, len(chunks)
    group = parallel.micro_batch_group_size or parallel.pipeline
    num_micro_batches = min(recipe.num_micro_batches, 3 * group)
    order = [
        chunk
        for first in range(0, num_micro_batches, group)
        for chunk in range(num_chunks)
        for _ in range(min(group, num_micro_batches - first))
    ]
    num_warmup = 2 * (parallel.pipeline - rank - 1) + (num_chunks - 1) * group
    num_warmup = min(num_warmup + recipe.overlap.expert_parallel, len(order))
    walk = _Walk(recipe, chunks, vector_bytes)
    for index in range(len(order) + num_warmup):
        ahead = order[index] if index < len(order) else None
        behind = num_chunks - 1 - order[index - num_warmup] if index >= num_warmup else None
        if ahead is not None and behind is not None and recipe.overlap.expert_parallel:
            walk.overlapped(ahead, behind)
            continue
        if ahead is not None:
            walk.forward(ahead, is_steady=index > num_warmup)
        if behind is not None:
            walk.backward(behind, is_steady=ahead is not None)
    return walk.peak()


class _Rest(NamedTuple):
    """What one chunk's last backward pass has left, and of what neighbours sent."""

    held: Held
    pipeline_bytes: int


_NO_REST = _Rest(NOTHING, 0)


def _rests(chunk: ChunkMemory, received_bytes: int) -> tuple[_Rest, _Rest]:
    """While micro batches of the chunk are in flight, and when none is."""
    lingering = chunk.lingering
    held = lingering.per_layer.times(lingering.num_layers)
    after_last = held.beside(lingering.after_last).beside(Held(0, 0, received_bytes))
    return _Rest(held, 0), _Rest(after_last, received_bytes)


class _Walk:
    """What is held as chunks run forward and backward in turn."""

    def __init__(self, recipe: Recipe, chunks: Sequence[ChunkMemory], vector_bytes: int) -> None:
        self._chunks, self._vector_bytes = chunks, vector_bytes
        self._prefetches = recipe.overlap.p2p
        self._received = [0 if chunk.chunk.has_embedding else vector_bytes for chunk in chunks]
        self._kept = [
            chunk.kept_bytes - received for chunk, received in zip(chunks, self._received, strict=True)
        ]
        self._rests_after = [
            _rests(chunk, received) for chunk, received in zip(chunks, self._received, strict=True)
        ]
        self._num_in_flight = [0] * len(chunks)
        self._rest = [_NO_REST] * len(chunks)
        self._rests = _NO_REST
        self._overlapped: dict[tuple[int, int], Instant] = {}
        self._live_bytes = self._pipeline_bytes = self._output_bytes = 0
        self._best_bytes = -1
        self._best: StepPeak | None = None

    def forward(self, index: int, *, is_steady: bool) -> None:
        """One micro batch forward through chunk `index`.

        Beside it stand the gradient that has come for the next backward pass, and the one that went out last.
        """
        self._enter(index)
        extra = self._vector_bytes * is_steady
        beside = Held(-self._received[index], 0, extra)
        self._look(self._chunks[index].forward, beside, extra, "forward")
        self._live_bytes += self._kept[index]
        self._output_bytes = self._chunks[index].output_bytes

    def backward(self, index: int, *, is_steady: bool) -> None:
        """One micro batch backward through chunk `index`.

        Beside it stand the output that was sent last, and the input that has come for the next forward pass
        where transfers overlap (pp_post_forward). The output's gradient comes from the neighbour.
        """
        chunk, vector = self._chunks[index], self._vector_bytes
        self._live_bytes -= self._kept[index]
        sent = 0 if chunk.chunk.has_loss else vector
        prefetched = vector * (is_steady and self._prefetches)
        beside = Held(self._output_bytes * is_steady - self._received[index], 0, vector - sent)
        instant = chunk.first_backward
        if self._rest[index] is not _NO_REST:
            # one layer's rest has just been replaced
            instant = chunk.backward.beside(
                chunk.lingering.per_layer.times(-(chunk.lingering.num_layers > 0))
            )
        self._look(instant, beside, sent + prefetched, "backward")
        self._leave(index)

    def overlapped(self, ahead: int, behind: int) -> None:
        """One micro batch forward through chunk `ahead` beside another backward through chunk `behind`."""
        self._enter(ahead)
        self._live_bytes -= self._kept[behind]
        if (ahead, behind) not in self._overlapped:
            pair = self._chunks[ahead], self._chunks[behind]
            self._overlapped[ahead, behind] = overlapped_instant(*pair, vector_bytes=self._vector_bytes)
        sent = 0 if self._chunks[behind].chunk.has_loss else self._vector_bytes
        beside = Held(-self._received[ahead] - self._received[behind], 0, 0)
        self._look(self._overlapped[ahead, behind], beside, sent, "backward")
        self._live_bytes += self._kept[ahead]
        self._output_bytes = self._chunks[ahead].output_bytes
        self._leave(behind)

    def peak(self) -> StepPeak:
        """The fullest moment so far. Raises ValueError before the first pass."""
        if self._best is None:
            raise ValueError("no pass has run")
        return self._best

    def _enter(self, index: int) -> None:
        """A micro batch comes to a chunk, and drops what lingers there."""
        self._set_rest(index, _NO_REST)
        self._num_in_flight[index] += 1
        self._pipeline_bytes += self._received[index]

    def _leave(self, index: int) -> None:
        """A micro batch has been through a chunk."""
        self._pipeline_bytes -= self._received[index]
        self._num_in_flight[index] -= 1
        self._set_rest(index, self._rests_after[index][self._num_in_flight[index] == 0])

    def _set_rest(self, index: int, rest: _Rest) -> None:
        before, self._rest[index] = self._rest[index], rest
        if before is not rest:
            held = self._rests.held.beside(rest.held).beside(before.held.times(-1))
            pipeline_bytes = self._rests.pipeline_bytes + rest.pipeline_bytes - before.pipeline_bytes
            self._rests = _Rest(held, pipeline_bytes)

    def _look(self, instant: Instant, beside: Held, pipeline_bytes: int, phase: Phase) -> None:
        total = instant.total_bytes + beside.total_bytes + self._live_bytes + self._rests.held.total_bytes
        pipeline_bytes += self._pipeline_bytes + self._rests.pipeline_bytes
        if total + pipeline_bytes <= self._best_bytes:
            return
        self._best_bytes = total + pipeline_bytes
        self._best = StepPeak(
            held=instant.held.beside(beside).beside(self._rests.held).plus(self._live_bytes),
            pipeline_bytes=pipeline_bytes,
            phase=phase,
            place=instant.place,
        )
