"""What one rank does from the first import to the last sample, on a GPU or without one."""

from __future__ import annotations

import contextlib
import resource
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from megatron.core import parallel_state

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness import device_facts, sanity
from moe_bench.harness.adapters import Adapt
from moe_bench.harness.batches import BatchPlan, Device
from moe_bench.harness.build import (
    Training,
    model_chunks,
    random_tracker,
    set_seeds,
    training,
    transformer_config,
)
from moe_bench.harness.implementations import implementations
from moe_bench.harness.mcore_config import MegatronArguments
from moe_bench.harness.patches import AppliedPatch, patch_names, patches
from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.profile import profiled
from moe_bench.harness.routing import ExpertLoad, LoadCounter
from moe_bench.harness.settings import Settings, settings_of
from moe_bench.harness.step_graphs import step_graphs
from moe_bench.harness.trainer import Trainer, Watch, speaks_for_job, speaks_for_stage
from moe_bench.harness.weights import initialise_by_name, nudge_by_name
from moe_bench.results.record import AloneSamples, GpuFacts, Implementations
from moe_bench.spec.profile import Profile
from moe_bench.spec.rendezvous import Rendezvous
from moe_bench.spec.training import LearningRate, Nudge

_BYTES_PER_KIB = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """Everything that one rank measured."""

    rank: int
    host: str
    gpu: GpuFacts | None
    warmup_step_times_s: tuple[float, ...]
    step_times_s: tuple[float, ...]
    losses: tuple[float, ...] | None
    """None but on the rank that speaks for the job: the first of the last pipeline stage."""
    grad_norms: tuple[float, ...]
    loads: tuple[ExpertLoad, ...]
    """Of the expert layers of a pipeline stage, over all its ranks; empty but on the stage's first rank."""
    peak_memory_bytes: int
    energy_j: float | None
    """Over the timed steps; None where the GPU does not count it."""
    implementations: Implementations
    patches: tuple[AppliedPatch, ...]
    stood_in_bytes: Mapping[str, int] = field(default_factory=dict)
    """Of one step, by collective and group, that loopback groups stood in for; empty where all ranks ran."""
    alone: AloneSamples | None = None
    """Of a slice."""
    traces: tuple[str, ...] = ()
    """Names of the files that a profiler wrote of this rank."""


def run_rank(
    arguments: MegatronArguments,
    rendezvous: Rendezvous,
    watch: Watch,
    *,
    listen_fd: int | None = None,
    profile: Profile | None = None,
) -> tuple[RankReport, ...] | None:
    """Train the warm-up and timed steps of `arguments` as one rank of a job.

    Rank 0 returns what all ranks measured, in their order; the others return None. Raises MeasurementError
    where no number may come of it, MissingRequirementError where something asked for is not here.
    """
    settings = settings_of(arguments)
    with joined(arguments, settings, rendezvous, listen_fd=listen_fd) as (device, applied):
        report = measured(arguments, settings, rendezvous, watch, applied, device=device, profile=profile)
        return _gathered(report, rendezvous)


@contextlib.contextmanager
def joined(
    arguments: MegatronArguments, settings: Settings, rendezvous: Rendezvous, *, listen_fd: int | None
) -> Iterator[tuple[Device, tuple[AppliedPatch, ...]]]:
    """This rank's device with all process groups of the job, until the block ends; raises as `machine`.

    A collective call of all ranks. `listen_fd` is the socket of forked ranks, None under a launcher.
    """
    with (
        machine(settings, rendezvous) as (device, applied),
        process_groups(
            rendezvous,
            backend="nccl" if device == "cuda" else "gloo",
            sizes=arguments.parallel_state,
            listen_fd=listen_fd,
        ),
    ):
        yield device, applied


@contextlib.contextmanager
def machine(settings: Settings, rendezvous: Rendezvous) -> Iterator[tuple[Device, tuple[AppliedPatch, ...]]]:
    """This rank's device, and Megatron-Core patched for it, until the block ends.

    Raises MeasurementError on another GPU than the recipe names, MissingRequirementError without one.
    """
    with contextlib.ExitStack() as stack:
        if settings.device is not None:
            _take_gpu(rendezvous, settings.device)
        else:
            from moe_bench.harness.host_device import host_device

            # One thread per rank: as many ranks as cores is the usual case, and sums are then reproducible.
            torch.set_num_threads(1)
            stack.enter_context(host_device())
        applied = stack.enter_context(patches(wanted_patches(settings)))
        yield ("cpu" if settings.device is None else "cuda"), applied


def wanted_patches(settings: Settings) -> tuple[str, ...]:
    """Patches to apply: those that the recipe asks for, that its kernels need, and on a host that one needs.

    Raises BadInputError if a recipe for a GPU asks for a patch that serves machines without one.
    """
    mends = () if settings.kernel_family == "transformer_engine" else patch_names("no_transformer_engine")
    if settings.device is None:
        return (*patch_names("host"), *mends, *settings.patches)
    for_hosts = set(settings.patches) & set(patch_names("host"))
    if for_hosts:
        raise BadInputError(f"patches: {', '.join(sorted(for_hosts))}: for machines without a GPU only")
    return (*mends, *settings.patches)


def _take_gpu(rendezvous: Rendezvous, name: str) -> None:
    device = gpu_index(rendezvous, num_visible=torch.cuda.device_count())
    torch.cuda.set_device(device)
    sanity.require_gpu(rank=rendezvous.rank, expected=name, found=torch.cuda.get_device_name(device))


def gpu_index(rendezvous: Rendezvous, *, num_visible: int) -> int:
    """Which of the GPUs that it sees a rank takes.

    A launcher that shows each rank its own GPU alone (srun --gpus-per-task) makes that number 0 for all of
    them; where two ranks take the same one, NCCL refuses.
    """
    if num_visible == 1:
        return 0
    if rendezvous.local_rank >= num_visible:
        raise MissingRequirementError(
            f"rank {rendezvous.rank}: no GPU {rendezvous.local_rank} on {socket.gethostname()}, "
            f"which shows {num_visible}"
        )
    return rendezvous.local_rank


def _gathered(report: RankReport, rendezvous: Rendezvous) -> tuple[RankReport, ...] | None:
    """Every rank's report on rank 0, None elsewhere. A collective call."""
    reports: list[RankReport] | None = [report] * rendezvous.world_size if rendezvous.rank == 0 else None
    torch.distributed.gather_object(report, reports)
    return None if reports is None else tuple(reports)


def measured(
    arguments: MegatronArguments,
    settings: Settings,
    rendezvous: Rendezvous,
    watch: Watch,
    applied: tuple[AppliedPatch, ...],
    *,
    device: Device,
    is_alone: bool = False,
    profile: Profile | None = None,
) -> RankReport:
    """Build the model, train its steps, and say what was measured; the process groups exist already.

    `is_alone` says that the other ranks do not run, so that what is counted is this rank's share. With a
    `profile` more steps follow the timed ones.
    """
    try:
        built = build(arguments, settings, device=device)
    except ImportError as error:
        raise MissingRequirementError(f"Megatron-Core cannot build the recipe here: {error}") from error
    counter = LoadCounter(built.chunks, num_steps=settings.num_steps, device=device)
    plan = batch_plan(settings, vocab_size=cast(int, arguments.model["vocab_size"]), device=device)
    with step_graphs(built, plan) as graphs:
        trainer = Trainer(
            built,
            plan,
            counter,
            rank=rendezvous.rank,
            num_steps=settings.num_steps,
            watch=watch,
            graphs=graphs,
            is_alone=is_alone,
        )
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        warmup_s = trainer.run(range(settings.num_warmup_steps))
        before_j = device_facts.energy_counter_j() if device == "cuda" else None
        timed_s = trainer.run(range(settings.num_warmup_steps, settings.num_steps))
        after_j = device_facts.energy_counter_j() if device == "cuda" else None
        loads = counter.loads()
        _require_sound_routing(built, settings, plan, loads, is_alone=is_alone)
        report = RankReport(
            rank=rendezvous.rank,
            host=socket.gethostname(),
            gpu=device_facts.gpu_facts() if device == "cuda" else None,
            warmup_step_times_s=warmup_s,
            step_times_s=timed_s,
            losses=tuple(trainer.losses) if is_alone or speaks_for_job() else None,
            grad_norms=tuple(trainer.grad_norms),
            loads=loads if is_alone or speaks_for_stage() else (),
            peak_memory_bytes=_peak_memory_bytes(device),
            energy_j=None if before_j is None or after_j is None else after_j - before_j,
            implementations=implementations(built),
            patches=applied,
        )
        if profile is None:
            return report
        run_more = partial(_repeat_last_step, trainer.unwatched(), settings, profile.num_steps)
        traced = profile if is_alone or speaks_for_stage() else None
        return replace(report, traces=profiled(run_more, built, traced, device=device))


def _repeat_last_step(trainer: Trainer, settings: Settings, num_times: int) -> None:
    for _ in range(num_times):
        trainer.run(range(settings.num_steps - 1, settings.num_steps))


def build(
    arguments: MegatronArguments,
    settings: Settings,
    *,
    device: Device,
    rates: LearningRate | None = None,
    weights_by_name: bool = False,
    nudge: Nudge | None = None,
    adapt: Adapt | None = None,
) -> Training:
    """Model and optimizer of this rank; `rates` is what a schedule of the learning rate wants of it.

    Where `adapt` gives the model adapters they learn and nothing else, biases of routers included. Without a
    GPU, or `weights_by_name`, every layout starts from the same weights, which `nudge` may move; else
    Megatron-Core draws them.
    """
    config = transformer_config(arguments)
    set_seeds(settings.seed, tracker=random_tracker(arguments))
    chunks = model_chunks(arguments, settings, config, device=device)
    if adapt is not None:
        adapt(chunks)
        config.moe_router_bias_update_rate = 0.0
    if device == "cpu" or weights_by_name:
        apart = device == "cuda"  # at full size no rank can draw all experts of a layer
        initialise_by_name(chunks, std=config.init_method_std, seed=settings.seed, experts_apart=apart)
        if nudge is not None:
            nudge_by_name(chunks, fraction=nudge.roundoff_fraction, seed=nudge.seed, experts_apart=apart)
    return training(arguments, settings, config, chunks, device=device, rates=rates)


def batch_plan(settings: Settings, *, vocab_size: int, device: Device) -> BatchPlan:
    """What this rank reads, from its place in the data-parallel group."""
    data_size = parallel_state.get_data_parallel_world_size()
    return BatchPlan(
        seed=settings.seed,
        vocab_size=vocab_size,
        seq_len=settings.seq_length,
        micro_batch_size=settings.micro_batch_size,
        num_micro_batches=settings.global_batch_size // (data_size * settings.micro_batch_size),
        data_rank=parallel_state.get_data_parallel_rank(),
        data_size=data_size,
        context_group=parallel_state.get_context_parallel_group(),
        device=device,
    )


def _num_stage_ranks(settings: Settings) -> int:
    """Ranks of one pipeline stage, which share its work."""
    return settings.world_size // parallel_state.get_pipeline_model_parallel_world_size()


def _require_sound_routing(
    built: Training,
    settings: Settings,
    plan: BatchPlan,
    loads: tuple[ExpertLoad, ...],
    *,
    is_alone: bool,
) -> None:
    """Refuse loads that the recipe does not allow; one rank alone has an equal share of its stage's."""
    if built.config.moe_expert_capacity_factor is not None:
        return
    sanity.require_no_drops(
        loads,
        tokens_per_step=settings.tokens_per_step // (_num_stage_ranks(settings) if is_alone else 1),
        top_k=built.config.moe_router_topk,
    )
    if settings.routing_mode == "round_robin":
        sanity.require_balance(loads, num_micro_batches=plan.num_micro_batches)


def _peak_memory_bytes(device: Device) -> int:
    """Device memory allocated at most since the model was built, or this process's largest resident set."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _BYTES_PER_KIB
