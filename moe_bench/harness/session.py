"""Run a recipe: fork its ranks where there is no GPU, or be the one rank that somebody started."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from moe_bench.errors import MissingRequirementError
from moe_bench.harness import device_facts, sanity
from moe_bench.harness.implementations import NONE_HERE
from moe_bench.harness.mcore_config import MegatronArguments
from moe_bench.harness.rank import RankReport, run_rank
from moe_bench.harness.requirements import require_runnable
from moe_bench.harness.settings import settings_of
from moe_bench.harness.slice import run_slice_rank
from moe_bench.harness.trainer import StepReport, Watch
from moe_bench.harness.workers import Message, Seat, run_forked
from moe_bench.results.record import GpuFacts, Implementations, Samples
from moe_bench.spec.profile import Profile
from moe_bench.spec.rendezvous import Rendezvous


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run leaves: the raw samples, and what only the ranks could tell about where it ran."""

    samples: Samples
    hosts: tuple[str, ...]
    """Host of each rank."""
    gpus: tuple[GpuFacts, ...]
    """One per rank; empty without GPUs."""
    topology: str | None
    nccl_version: str | None
    cuda_version: str | None
    traces: tuple[str, ...] = ()
    """Names of the files that a profiler wrote."""


def run(
    arguments: MegatronArguments,
    *,
    rendezvous: Rendezvous | None,
    on_report: Callable[[StepReport], None],
    slice_rank: int | None = None,
    profile: Profile | None = None,
) -> Outcome | None:
    """Run as many steps as `arguments` ask for; of a slice, its rank `slice_rank` alone.

    With a `profile` more steps run under it afterwards.

    With a `rendezvous` this process is one rank, and all but rank 0 return None; `on_report` is then called
    on the one rank that knows the loss. Without one, and without a GPU, the ranks are forked from this
    process, which must have one thread and must have run no tensor operation; `on_report` is called here.

    Raises MeasurementError if the run gave no valid number, MissingRequirementError if something is not here.
    """
    require_runnable(arguments)
    settings = settings_of(arguments)
    num_ranks = settings.world_size if slice_rank is None else 1
    if rendezvous is not None:
        return _run_as_one_rank(
            arguments, rendezvous, num_ranks, on_report, slice_rank=slice_rank, profile=profile
        )
    if settings.device is not None:
        raise MissingRequirementError(
            f"{num_ranks} GPU ranks need a launcher: start them with torchrun, srun or slurm/run_recipe.sh"
        )
    rank_program = partial(_forked_rank, arguments, slice_rank=slice_rank, profile=profile)
    gathered, *_ = run_forked(num_ranks, rank_program, on_progress=on_report)
    return None if gathered is None else _outcome(gathered, num_ranks)


def _forked_rank(
    arguments: MegatronArguments, seat: Seat, *, slice_rank: int | None, profile: Profile | None
) -> tuple[RankReport, ...] | None:
    watch = Watch(
        now_s=time.perf_counter,
        on_step=lambda step: seat.send(Message(kind="step", content=step)),
        on_report=lambda report: seat.send(Message(kind="progress", content=report)),
    )
    if slice_rank is not None:
        return run_slice_rank(arguments, seat.rendezvous, watch, rank=slice_rank, profile=profile)
    return run_rank(arguments, seat.rendezvous, watch, listen_fd=seat.listen_fd, profile=profile)


def _run_as_one_rank(
    arguments: MegatronArguments,
    rendezvous: Rendezvous,
    num_ranks: int,
    on_report: Callable[[StepReport], None],
    *,
    slice_rank: int | None,
    profile: Profile | None,
) -> Outcome | None:
    if rendezvous.world_size != num_ranks:
        needed = f"parallel.num_gpus: the recipe needs {num_ranks} ranks"
        what = needed if slice_rank is None else "a slice is one rank"
        raise MissingRequirementError(f"{what}, {rendezvous.world_size} were started")
    watch = Watch(now_s=time.perf_counter, on_step=lambda step: None, on_report=on_report)
    if slice_rank is not None:
        alone = run_slice_rank(arguments, rendezvous, watch, rank=slice_rank, profile=profile)
        return _outcome(alone, num_ranks)
    gathered = run_rank(arguments, rendezvous, watch, profile=profile)
    return None if gathered is None else _outcome(gathered, num_ranks)


def _outcome(reports: tuple[RankReport, ...], num_ranks: int) -> Outcome:
    """Join what the ranks measured."""
    sanity.require_all_ranks([report.rank for report in reports], world_size=num_ranks)
    speaker = next(report for report in reports if report.losses is not None)
    first = reports[0]
    gpus = tuple(report.gpu for report in reports if report.gpu is not None)
    return Outcome(
        samples=Samples(
            warmup_step_times_s=tuple(report.warmup_step_times_s for report in reports),
            step_times_s=tuple(report.step_times_s for report in reports),
            losses=speaker.losses or (),
            grad_norms=speaker.grad_norms,
            peak_memory_bytes=tuple(report.peak_memory_bytes for report in reports),
            tokens_per_expert=_tokens_per_expert(reports, num_warmup=len(first.warmup_step_times_s)),
            energy_j=_energies_j(reports),
            implementations=_joined_implementations(reports),
            patches=tuple(patch.name for patch in first.patches),
            stood_in_bytes=dict(first.stood_in_bytes),
            alone=first.alone,
        ),
        hosts=tuple(report.host for report in reports),
        gpus=gpus,
        topology=device_facts.topology() if gpus else None,
        nccl_version=device_facts.nccl_version() if gpus else None,
        cuda_version=device_facts.cuda_version() if gpus else None,
        traces=tuple(name for report in reports for name in report.traces),
    )


def _energies_j(reports: tuple[RankReport, ...]) -> tuple[float, ...] | None:
    """Energy of every rank; None unless all of them count it."""
    counted = tuple(report.energy_j for report in reports if report.energy_j is not None)
    return counted if len(counted) == len(reports) else None


def _tokens_per_expert(
    reports: tuple[RankReport, ...], *, num_warmup: int
) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """Timed step, expert layer (those of MTP last), expert."""
    loads = sorted(
        (load for report in reports for load in report.loads), key=lambda load: (load.is_mtp, load.layer)
    )
    per_layer = [load.tokens_per_step[num_warmup:] for load in loads]
    return tuple(zip(*per_layer, strict=True))


def _joined_implementations(reports: tuple[RankReport, ...]) -> Implementations:
    """What any rank ran: stages differ, as one with dense layers only has no experts."""

    def join(kind: str) -> str:
        names = {name for report in reports for name in getattr(report.implementations, kind).split(",")}
        return ",".join(sorted(names - {NONE_HERE})) or NONE_HERE

    return Implementations(**{kind: join(kind) for kind in Implementations.model_fields})
