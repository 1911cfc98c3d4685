"""The words of a pipeline schedule: its kinds, its sizes, and a pass of a micro batch through a chunk."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from moe_bench.errors import BadInputError


class ScheduleKind(StrEnum):
    """In which order a pipeline rank works; the first four are Megatron-Core's, the others are what-ifs."""

    NO_PIPELINE = "no_pipeline"
    ONE_F_ONE_B = "one_f_one_b"
    INTERLEAVED = "interleaved"
    INTERLEAVED_EP_OVERLAP = "interleaved_ep_overlap"
    """`overlap_moe_expert_parallel_comm`: a forward and a backward pass in one slot; also on one rank."""
    ZERO_BUBBLE_H1 = "zero_bubble_h1"
    """1F1B whose weight gradients wait for the bubble of the flush (arXiv:2401.10241)."""
    ZERO_BUBBLE_V = "zero_bubble_v"
    """Two chunks per rank, placed as a V, without bubble where F = D = W (arXiv:2405.15362)."""
    DUAL_PIPE_V = "dual_pipe_v"
    """DeepSeek's DualPipe cut in half: two chunks as a V, forward and backward passes merged."""

    @property
    def label(self) -> str:
        """For headings and captions."""
        return _LABELS[self]

    @property
    def has_v_placement(self) -> bool:
        """Whether chunk i >= PP stands on rank 2 PP - 1 - i, instead of i modulo PP."""
        return self in (ScheduleKind.ZERO_BUBBLE_V, ScheduleKind.DUAL_PIPE_V)

    @property
    def overlap_choices(self) -> tuple[bool, ...]:
        """Which `overlaps_transfer` the schedule knows.

        Megatron-Core runs transfers beside compute only where it interleaves; the what-ifs always do.
        """
        if self in (ScheduleKind.NO_PIPELINE, ScheduleKind.INTERLEAVED, ScheduleKind.INTERLEAVED_EP_OVERLAP):
            return (False, True)
        return (self is not ScheduleKind.ONE_F_ONE_B,)


_LABELS = {
    ScheduleKind.NO_PIPELINE: "No pipeline",
    ScheduleKind.ONE_F_ONE_B: "1F1B",
    ScheduleKind.INTERLEAVED: "Interleaved 1F1B",
    ScheduleKind.INTERLEAVED_EP_OVERLAP: "Interleaved 1F1B with overlapped expert parallelism",
    ScheduleKind.ZERO_BUBBLE_H1: "ZB-H1",
    ScheduleKind.ZERO_BUBBLE_V: "ZB-V",
    ScheduleKind.DUAL_PIPE_V: "DualPipeV",
}


class PassKind(StrEnum):
    """What is computed of a chunk; a backward pass is whole, or split into its two halves."""

    FORWARD = "F"
    BACKWARD = "B"
    """Both gradients."""
    DGRAD = "D"
    """Gradient of the input, which the chunk before waits for."""
    WGRAD = "W"
    """Gradient of the weights, which only the optimizer waits for."""


class Pass(NamedTuple):
    """One pass of one micro batch through one model chunk; also the name of the tensor that it sends."""

    kind: PassKind
    chunk: int
    """In the order in which a token passes the chunks."""
    micro_batch: int


class ScheduleError(BadInputError):
    """A schedule that cannot exist with these sizes; the message says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleShape:
    """Everything that fixes the order of work. Raises ScheduleError where no such schedule exists."""

    kind: ScheduleKind
    num_ranks: int
    num_virtual: int
    """Chunks per rank."""
    num_micro_batches: int
    group_size: int
    """Micro batches that pass one chunk before the next chunk's turn; read only where chunks interleave."""

    def __post_init__(self) -> None:
        for problem, fix in self._problems():
            raise ScheduleError(f"{self.kind} with {self._sizes}: {problem}; {fix}")

    @property
    def num_chunks(self) -> int:
        """Chunks of the whole pipeline."""
        return self.num_ranks * self.num_virtual

    def rank_of(self, chunk: int) -> int:
        """The pipeline rank on which `chunk` stands."""
        if self.kind.has_v_placement:
            return min(chunk, self.num_chunks - 1 - chunk)
        return chunk % self.num_ranks

    def chunks_of(self, rank: int) -> tuple[int, ...]:
        """The chunks of `rank`, in model order."""
        return tuple(chunk for chunk in range(self.num_chunks) if self.rank_of(chunk) == rank)

    @property
    def _sizes(self) -> str:
        return (
            f"PP{self.num_ranks}, {self.num_virtual} chunks per rank, {self.num_micro_batches} micro batches "
            f"in groups of {self.group_size}"
        )

    def _problems(self) -> list[tuple[str, str]]:
        kind, ranks, virtual, batches = self.kind, self.num_ranks, self.num_virtual, self.num_micro_batches
        if min(ranks, virtual, batches) < 1:
            return [("a size below 1", "every size counts something")]
        is_alone = kind is ScheduleKind.INTERLEAVED_EP_OVERLAP and ranks == 1
        if kind is ScheduleKind.NO_PIPELINE or is_alone:
            return [] if ranks == virtual == 1 else [("it is for one rank with one chunk", "pipeline: 1")]
        if kind in (ScheduleKind.INTERLEAVED, ScheduleKind.INTERLEAVED_EP_OVERLAP):
            return self._group_problems()
        wanted = 2 if kind.has_v_placement else 1
        if virtual != wanted:
            return [(f"it has {wanted} chunks per rank", f"virtual_pipeline: {wanted}")]
        if kind is ScheduleKind.DUAL_PIPE_V and batches < 2 * ranks:
            return [("it fills the pipeline from both ends", f"at least {2 * ranks} micro batches")]
        if kind is ScheduleKind.ZERO_BUBBLE_V and batches < 2 * ranks - 1:
            return [("it fills the pipeline twice", f"at least {2 * ranks - 1} micro batches")]
        return []

    def _group_problems(self) -> list[tuple[str, str]]:
        """What Megatron-Core's forward_backward_pipelining_with_interleaving refuses."""
        ranks, batches, group = self.num_ranks, self.num_micro_batches, self.group_size
        if ranks < 2 or self.num_virtual < 2:
            return [
                ("one rank or one chunk per rank does not interleave", "pipeline and virtual_pipeline >= 2")
            ]
        if not ranks <= group <= batches:
            return [
                ("a group is smaller than the pipeline or larger than the batch", f"{ranks} to {batches}")
            ]
        if 0 < batches % group < ranks:
            return [("the last group is smaller than the pipeline", "change the group or the global batch")]
        return []
