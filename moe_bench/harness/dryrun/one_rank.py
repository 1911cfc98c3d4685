"""One rank of a job, built and stepped through real Megatron-Core on tensors without data."""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed.fsdp.mcore_fsdp_adapter import FullyShardedDataParallel
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from torch.distributed.tensor import DTensor

from moe_bench.analysis.activations import multiplies_experts_row_wise
from moe_bench.errors import MissingRequirementError
from moe_bench.harness.batches import MicroBatch
from moe_bench.harness.build import Training, model_chunks, set_seeds, training, transformer_config
from moe_bench.harness.dryrun.accounting import Account, Category, bytes_by_category
from moe_bench.harness.dryrun.findings import Findings
from moe_bench.harness.dryrun.meta_device import META, has_values, meta_device
from moe_bench.harness.dryrun.outcome import (
    FlopsLine,
    HeldLine,
    MemoryPeak,
    RankDryRun,
    StandInUse,
    TrafficLine,
)
from moe_bench.harness.dryrun.phases import phases
from moe_bench.harness.dryrun.places import Phase, Places, layer_of
from moe_bench.harness.dryrun.schedule import SYNCS, WatchedBatches, over_the_step
from moe_bench.harness.dryrun.stand_ins import StandIn, stand_ins
from moe_bench.harness.dryrun.standalone_mtp import known_shapes
from moe_bench.harness.dryrun.token_counts import SenderCounts, token_counts
from moe_bench.harness.loopback import Ledger, LedgerKey, Traffic, Transfer, loopback_groups
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.patches import patch_names, patches
from moe_bench.harness.settings import settings_of
from moe_bench.harness.step import train_step
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.steady_state import num_micro_batches_to_run

TIMELINE_POINTS = 1000
SHARED_STORAGE = "host_share_storage"
"""A patch for hosts that copies; here the storage is handed over, as on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What observes a run."""

    places: Places
    account: Account
    ledger: Ledger
    findings: Findings

    def on_transfer(self, transfer: Transfer) -> None:
        """Hear of one transfer."""
        self.ledger.record(transfer)
        self.findings.note(transfer, self.places.where()[0])


def dry_run_rank(
    recipe: Recipe,
    rank: int,
    *,
    counts: SenderCounts | None = None,
    num_micro_batches: int | None = None,
) -> RankDryRun:
    """Build rank `rank` of `recipe`, a recipe that `dryrun_plan` derived, and take one step.

    `counts` is a routing matrix (None: balanced), `num_micro_batches` how many to run (None: the fewest that
    reach the steady state).

    Raises BadInputError for a matrix that does not fit or where Megatron-Core refuses the recipe,
    MissingRequirementError where the installed one cannot build it.
    """
    places = Places()
    watch = Watch(
        places=places,
        account=Account(places),
        ledger=Ledger(places.where),
        findings=Findings(places, frees_weights=recipe.parallel.data_sharding == "megatron_fsdp"),
    )
    num_run = num_micro_batches or num_micro_batches_to_run(recipe)
    with stage(recipe, rank, watch, counts) as used:
        built = built_without_data(recipe, watch)
        _make_optimizer_states(recipe, built, watch)
        return _stepped(recipe, rank, built, watch, used, num_run=num_run)


@contextlib.contextmanager
def stage(
    recipe: Recipe, rank: int, watch: Watch, counts: SenderCounts | None
) -> Iterator[tuple[StandIn, ...]]:
    """Everything that the code of a rank meets: device, kernels, token counts, groups, and who watches."""
    arguments = megatron_arguments(recipe)
    mends = (*patch_names("host"), *patch_names("no_transformer_engine"), *recipe.patches)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_quiet())
        stack.enter_context(meta_device())
        stack.enter_context(patches([name for name in mends if name != SHARED_STORAGE]))
        used = stack.enter_context(stand_ins(recipe, watch.account.add_flops))
        stack.enter_context(token_counts(counts))
        stack.enter_context(
            loopback_groups(
                world_size=recipe.parallel.num_gpus,
                rank=rank,
                sizes=arguments.parallel_state,
                on_transfer=watch.on_transfer,
            )
        )
        stack.enter_context(watch.places.watched())
        stack.enter_context(watch.account.watched())
        try:
            yield used
        finally:
            destroy_moe_metrics_tracker()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Leave to the run itself what Megatron-Core warns of (deprecated classes, fusions)."""
    logger = logging.getLogger("megatron.core")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logger.setLevel(level)


def built_without_data(recipe: Recipe, watch: Watch) -> Training:
    """Model, gradient buffers and optimizer of the rank, each in its category."""
    arguments, account = megatron_arguments(recipe), watch.account
    settings = settings_of(arguments)
    try:
        config = transformer_config(arguments)
        # There are no values to initialise.
        config.perform_initialization = False
        set_seeds(settings.seed)
        chunks = model_chunks(arguments, settings, config, device="cuda")
        for chunk in chunks:
            _move_to_device(chunk)
        watch.places.name_modules(chunks)
        with account.holding(Category.OPTIMIZER):
            built = training(arguments, settings, config, chunks, device="cuda")
    except ImportError as error:
        raise MissingRequirementError(f"Megatron-Core cannot build the recipe here: {error}") from error
    for tensor, category in _buffers(built):
        account.assign(tensor, category)
    return built


def _move_to_device(chunk: torch.nn.Module) -> None:
    """Parameters that were made on the host, with the marks that `Module.to` would lose on the way to meta.

    From host to GPU it keeps the parameter and exchanges its data; between host and meta torch cannot.
    """
    for module in chunk.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if has_values(parameter):
                moved = torch.nn.Parameter(parameter.detach().to(META), requires_grad=parameter.requires_grad)
                vars(moved).update(vars(parameter))
                setattr(module, name, moved)


def _buffers(built: Training) -> Iterator[tuple[torch.Tensor, Category]]:
    """The buffers that data parallelism keeps weights and gradients in."""
    for chunk in built.chunks:
        if isinstance(chunk, FullyShardedDataParallel):
            yield from _sharded_buffers(chunk)
            continue
        for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
            yield buffer.grad_data, Category.GRADIENTS
            if buffer.param_data is not None:
                yield buffer.param_data, Category.WEIGHTS


def _sharded_buffers(chunk: FullyShardedDataParallel) -> Iterator[tuple[torch.Tensor, Category]]:
    """This rank's shards, as Megatron-FSDP keeps them."""
    for group in chunk.module.param_and_grad_buffer.parameter_groups:
        for buffer, category in (
            (group.model_weight_buffer, Category.WEIGHTS),
            (group.main_weight_buffer, Category.OPTIMIZER),
            (group.main_grad_buffer, Category.GRADIENTS),
        ):
            if buffer is not None and buffer.data is not None:
                yield buffer.data, category


def _make_optimizer_states(recipe: Recipe, built: Training, watch: Watch) -> None:
    """Let the optimizer take a step first, as the moments are made in the first one.

    Megatron-FSDP hands over gradients only after a backward pass; it gets one micro batch.
    """
    with watch.places.during(Phase.FORWARD):
        if recipe.parallel.data_sharding == "megatron_fsdp":
            train_step(built, micro_batches_without_data(recipe)[:1])
        else:
            for chunk in built.chunks:
                chunk.zero_grad_buffer()
            built.optimizer.step()
            built.optimizer.zero_grad()
    for state in _optimizer_states(built):
        watch.account.assign(state, Category.OPTIMIZER)


def _optimizer_states(built: Training) -> Iterator[torch.Tensor]:
    """Moments and FP32 weights inside the optimizers, on the device."""
    optimizer = built.optimizer
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for state in part.optimizer.state.values():
            for value in state.values():
                tensor = value.to_local() if isinstance(value, DTensor) else value
                if isinstance(tensor, torch.Tensor) and not has_values(tensor):
                    yield tensor


def _quantize_weights(recipe: Recipe, built: Training) -> None:
    """Make the FP8 copies that experts keep over a step, which the first micro batch makes on a GPU."""
    if not multiplies_experts_row_wise(recipe):
        return
    from moe_bench.harness.kernels.fp8_grouped import quantized_stacks  # imports Triton

    for stack, products in quantized_stacks(built.chunks):
        products.keep_weights(stack.weights[0])


def _stepped(
    recipe: Recipe, rank: int, built: Training, watch: Watch, used: tuple[StandIn, ...], *, num_run: int
) -> RankDryRun:
    places, account = watch.places, watch.account
    watch.ledger.lines.clear()
    account.flops.clear()
    account.num_calls.clear()
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    shapes = known_shapes(recipe, pipeline_rank=pipeline_rank, num_micro_batches=num_run)
    with account.holding(Category.WEIGHTS):
        _quantize_weights(recipe, built)
    with account.holding(Category.INPUTS):
        # a step holds the tokens of all its micro batches
        all_batches = micro_batches_without_data(recipe)
    micro_batches = WatchedBatches(all_batches[:num_run], watch.ledger)
    with shapes, phases(places, built), places.during(Phase.FORWARD):
        account.start_peak()
        train_step(built, micro_batches)
    peak = account.peak
    findings = watch.findings.conclude(built.chunks, account)
    dense, expert = _num_params(built)
    return RankDryRun(
        rank=rank,
        pipeline_rank=pipeline_rank,
        num_dense_params=dense,
        num_expert_params=expert,
        peak=MemoryPeak(
            num_bytes=peak.num_bytes,
            bytes_by_category={
                category.value: size for category, size in bytes_by_category(peak.by_owner).items()
            },
            bytes_by_owner=tuple(
                HeldLine(category=owner.category.value, module=owner.module, num_bytes=size)
                for owner, size in sorted(peak.by_owner.items())
            ),
            bytes_by_phase={phase.value: size for phase, size in account.peak_bytes_by_phase.items()},
            phase=peak.phase.value,
            module=peak.module,
        ),
        timeline_bytes=_sampled(account.timeline),
        **_totals(recipe, watch, micro_batches),
        num_micro_batches=recipe.num_micro_batches,
        num_micro_batches_run=num_run,
        findings=findings,
        stand_ins=tuple(
            StandInUse(kernel=e.kernel, keeps=e.keeps, source=e.source, is_verified=e.verified) for e in used
        ),
    )


def micro_batches_without_data(recipe: Recipe) -> list[MicroBatch]:
    """A step's batches without values, each as long as the part of a sequence that a context rank holds."""
    shape = (recipe.micro_batch_size, recipe.seq_len // recipe.parallel.context)
    return [
        {
            **{name: torch.zeros(shape, dtype=torch.int64, device=META) for name in _INTEGERS},
            "loss_mask": torch.zeros(shape, device=META),
            "first_sample": torch.zeros((), dtype=torch.int64),
        }
        for _ in range(recipe.num_micro_batches)
    ]


_INTEGERS = ("tokens", "labels", "position_ids")


def _num_params(built: Training) -> tuple[int, int]:
    """Dense and expert parameters of the rank."""
    num = Counter[bool]()
    for chunk in built.chunks:
        for name, parameter in chunk.named_parameters():
            num[".experts." in name] += parameter.numel()
    return num[False], num[True]


def _totals(recipe: Recipe, watch: Watch, batches: WatchedBatches) -> dict[str, Any]:
    """Operations, traffic and calls over the whole step."""
    num_run, num_wanted = len(batches), recipe.num_micro_batches

    def whole(count: int, phase: Phase) -> int:
        return over_the_step(count, phase, num_run=num_run, num_micro_batches=num_wanted)

    def whole_line(key: LedgerKey, line: Traffic) -> Traffic:
        if recipe.parallel.data_sharding == "megatron_fsdp" and key.phase in SYNCS:
            return batches.with_more(key, line, num_more=num_wanted - num_run)
        calls, num_bytes = (whole(count, Phase(key.phase)) for count in (line.num_calls, line.num_bytes))
        return Traffic(num_calls=calls, num_bytes=num_bytes)

    flops = Counter[tuple[str, Phase, str]]()
    for (phase, module, kind), num_flops in watch.account.flops.items():
        flops[kind.value, phase, layer_of(module)] += num_flops
    return {
        "flops": tuple(
            FlopsLine(kind=kind, phase=phase.value, layer=layer, num_flops=whole(num_flops, phase))
            for (kind, phase, layer), num_flops in sorted(flops.items())
        ),
        "traffic": tuple(
            TrafficLine(
                op=key.op,
                group=key.group,
                group_size=key.group_size,
                phase=key.phase,
                layer=key.place,
                num_calls=line.num_calls,
                num_bytes=line.num_bytes,
            )
            for key, line in (
                (key, whole_line(key, line)) for key, line in sorted(watch.ledger.lines.items())
            )
        ),
        "num_operator_calls": {phase.value: num for phase, num in watch.account.num_calls.items()},
    }


def _sampled(timeline: Any) -> tuple[int, ...]:
    """The maxima of `TIMELINE_POINTS` equal parts."""
    if len(timeline) <= TIMELINE_POINTS:
        return tuple(timeline)
    edges = [index * len(timeline) // TIMELINE_POINTS for index in range(TIMELINE_POINTS + 1)]
    return tuple(max(timeline[start:end]) for start, end in itertools.pairwise(edges))
