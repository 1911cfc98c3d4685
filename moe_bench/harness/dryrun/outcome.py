"""What a dry run found, as plain data: one rank's memory, operations and traffic over one step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe_bench.spec.scale import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldLine:
    """What was held at the peak for one purpose and taken while one module ran."""

    category: str
    module: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPeak:
    """The most device memory that live tensors held at once."""

    num_bytes: int
    bytes_by_category: Mapping[str, int]
    bytes_by_owner: tuple[HeldLine, ...]
    phase: str
    module: str
    """Module that ran when the peak was reached, `decoder.17.mlp.experts`; `-` outside of the model."""
    bytes_by_phase: Mapping[str, int]
    """The most that was held in each phase."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficLine:
    """What one collective carried over one group in one layer and phase, over a whole step."""

    op: str
    group: str
    group_size: int
    phase: str
    layer: str
    num_calls: int
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopsLine:
    """Floating-point operations of one kind in one phase and layer, over a whole step."""

    kind: str
    phase: str
    layer: str
    num_flops: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """Something that costs memory or traffic and need not."""

    kind: str
    what: str
    num_bytes: int
    where: tuple[str, ...]
    """Layers or groups."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StandInUse:
    """A kernel that was stood in for."""

    kernel: str
    keeps: str
    source: str
    is_verified: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RankDryRun:
    """One rank over one step, in the form that the dry run builds."""

    rank: int
    pipeline_rank: int
    num_dense_params: int
    num_expert_params: int
    peak: MemoryPeak
    timeline_bytes: tuple[int, ...]
    """The most that was held in each of equal parts of the step, counted in operator calls."""
    flops: tuple[FlopsLine, ...]
    traffic: tuple[TrafficLine, ...]
    num_operator_calls: Mapping[str, int]
    """Operators that launch work on the device, by phase, over the micro batches that were run."""
    num_micro_batches: int
    """Of a whole step."""
    num_micro_batches_run: int
    findings: tuple[Finding, ...]
    stand_ins: tuple[StandInUse, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """By how much the real run's peak differs for one reason, as far as a closed form says."""

    term: str
    num_bytes: int | None
    """To add to the peak; None where nobody says how much."""
    source: str
    is_verified: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RankOutcome:
    """A rank's dry run, and what would be different in the recipe that was asked for."""

    run: RankDryRun
    corrections: tuple[Correction, ...]

    @property
    def corrected_peak_bytes(self) -> int:
        """The peak with every term that has a figure."""
        return self.run.peak.num_bytes + sum(term.num_bytes or 0 for term in self.corrections)


@dataclass(frozen=True, slots=True, kw_only=True)
class DryRun:
    """What was asked, what was built instead, and each rank that was run."""

    plan: Plan
    ranks: tuple[RankOutcome, ...]
