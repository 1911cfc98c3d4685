"""One run as it was: the plan, every raw sample and where it ran. Means and TFLOPs are computed on read."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from moe_bench.analysis.stats import slowest_ranks
from moe_bench.spec.base import NonNegativeInt, PositiveInt, Spec, Text
from moe_bench.spec.scale import Plan

SCHEMA_VERSION = 1
"""1: first layout."""


class GitState(Spec):
    """The source tree that ran; null fields where it was installed without one."""

    commit: str | None
    branch: str | None
    is_dirty: bool | None

    @property
    def short_name(self) -> str:
        """`0123abcd`, `0123abcd-dirty`, or `nocommit`: part of a record's file name."""
        return (self.commit or "nocommit")[:8] + ("-dirty" if self.is_dirty else "")


class GpuFacts(Spec):
    """What one rank's GPU said about itself before the first step."""

    name: Text
    driver_version: str | None = None
    power_limit_w: float | None = None
    sm_clock_hz: float | None = None
    max_sm_clock_hz: float | None = None
    memory_bytes: int | None = None
    ecc_enabled: bool | None = None
    compute_mode: str | None = None


class Provenance(Spec):
    """Where, when and with what a run was made. Never holds a secret: the environment is an allow-list."""

    started_at: Text
    """UTC, ISO 8601."""
    command: tuple[str, ...]
    job_id: Text
    repeat: NonNegativeInt = 0
    """Which of the runs that one command asked for, from 0."""
    git: GitState
    python_version: Text
    packages: dict[str, str]
    hosts: tuple[str, ...]
    """Host of each rank."""
    cpu_model: str | None
    os: Text
    container: str | None
    gpus: tuple[GpuFacts, ...]
    """One per rank; empty without GPUs."""
    topology: str | None
    """`nvidia-smi topo -m` of the first host: NVLink and network cards."""
    nccl_version: str | None
    cuda_version: str | None
    environment: dict[str, str]
    traces: tuple[Text, ...] = ()
    """Files of a profiler in the record's folder, of steps that followed the timed ones."""


class Implementations(Spec):
    """The kernels that really ran, as the modules themselves report."""

    attention: Text
    experts: Text
    dispatcher: Text
    router: Text = "not recorded"
    normalization: Text
    optimizer: Text


class AloneSamples(Spec):
    """What only a slice tells, whose one rank waits for nobody."""

    schedule_times_s: tuple[float, ...]
    """Of each timed step on the device: every forward and backward pass, without the optimizer."""
    stand_in_s: float
    """Of the first timed step's schedule: copies by which loopback groups filled what others would send."""


class Samples(Spec):
    """What was measured, unreduced. The outer index is the rank, the inner one the step."""

    warmup_step_times_s: tuple[tuple[float, ...], ...]
    step_times_s: tuple[tuple[float, ...], ...]
    losses: tuple[float, ...]
    """Language-model loss of every step, warm-up first, mean over the global batch; empty of a slice without
    the last pipeline stage."""
    grad_norms: tuple[float, ...]
    """Before clipping; warm-up first."""
    peak_memory_bytes: tuple[int, ...]
    """Per rank: device memory allocated, or the process's resident set without a GPU."""
    tokens_per_expert: tuple[tuple[tuple[int, ...], ...], ...]
    """Step, expert layer, expert: tokens routed in that step over the whole job, of a slice by its one rank;
    warm-up left out."""
    energy_j: tuple[float, ...] | None
    """Per rank over the timed steps, where the GPU counts it."""
    implementations: Implementations
    patches: tuple[str, ...]
    """Names of the changes to Megatron-Core that were applied."""
    stood_in_bytes: dict[str, int] = Field(default_factory=dict)
    """Of the first timed step, by `<collective> <group>`: bytes that the rank of a slice handed to loopback
    groups, as `Transfer.num_bytes` counts them. Nothing was sent. Empty where all ranks ran."""
    alone: AloneSamples | None = None
    """Null where all ranks ran."""


class Record(Spec):
    """One run, written once."""

    schema_version: Literal[1] = 1
    plan: Plan
    provenance: Provenance
    samples: Samples

    @property
    def num_ranks(self) -> PositiveInt:
        """Processes that took part."""
        return len(self.samples.step_times_s)

    @property
    def has_loss(self) -> bool:
        """Whether a rank of the last pipeline stage took part."""
        plan = self.plan
        return not plan.is_slice or plan.pipeline_rank == plan.recipe.parallel.pipeline - 1

    @property
    def num_sharing_ranks(self) -> PositiveInt:
        """Ranks that share the work of the recipe's step equally; of a slice, only one of them ran."""
        return self.plan.recipe.parallel.num_gpus if self.plan.is_slice else self.num_ranks

    @property
    def tokens_per_step(self) -> float:
        """Tokens of one optimizer step that were trained here; of a slice, one rank's share."""
        return self.plan.recipe.tokens_per_step * self.num_ranks / self.num_sharing_ranks

    def slowest_step_times_s(self) -> tuple[float, ...]:
        """Time of each timed step: that of its slowest rank, for the step ends when the last one does."""
        return tuple(step.step_time_s for step in slowest_ranks(self.samples.step_times_s))

    def slowest_rank(self) -> NonNegativeInt:
        """The rank with the largest total time over the timed steps."""
        totals_s = [sum(times) for times in self.samples.step_times_s]
        return totals_s.index(max(totals_s))
