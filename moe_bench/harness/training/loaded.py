"""A model with the weights of a checkpoint on each rank of a layout, for what learns nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import distributed

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness.batches import BatchPlan
from moe_bench.harness.build import Training, model_chunks, set_seeds, transformer_config, without_optimizer
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.rank import batch_plan, machine
from moe_bench.harness.requirements import require_runnable
from moe_bench.harness.settings import settings_of
from moe_bench.harness.training.checkpoint import load_checkpoint
from moe_bench.harness.workers import Seat, run_forked
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.rendezvous import Rendezvous


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One rank's part of the model, and what it reads."""

    model: Training
    plan: BatchPlan
    num_steps: int
    """Steps that the weights have taken."""


@contextlib.contextmanager
def loaded(
    recipe: Recipe, checkpoint: Path, rendezvous: Rendezvous, *, listen_fd: int | None
) -> Iterator[Loaded]:
    """Hold the model of `recipe` with the weights of `checkpoint`, whatever layout saved them.

    A collective call of all ranks. Raises BadInputError with the tensor's name where they do not fit.
    """
    arguments = megatron_arguments(recipe)
    settings = settings_of(arguments)
    with (
        machine(settings, rendezvous) as (device, _),
        process_groups(
            rendezvous,
            backend="nccl" if device == "cuda" else "gloo",
            sizes=arguments.parallel_state,
            listen_fd=listen_fd,
        ),
    ):
        config = transformer_config(arguments)
        set_seeds(settings.seed)
        chunks = model_chunks(arguments, settings, config, device=device)
        model = without_optimizer(config, chunks, device=device)
        progress = load_checkpoint(model, checkpoint, with_optimizer=False)
        vocab_size = cast(int, arguments.model["vocab_size"])
        yield Loaded(
            model=model,
            plan=batch_plan(settings, vocab_size=vocab_size, device=device),
            num_steps=progress.num_steps,
        )


def on_all_ranks[Result](
    recipe: Recipe, work: Callable[[Rendezvous, int | None], Result], *, rendezvous: Rendezvous | None
) -> Result:
    """What `work` returns on rank 0, given each rank's place and, of forked ranks, the socket of rank 0.

    With a `rendezvous` this process is one rank and gets its own result. Without one, and without a GPU, the
    ranks are forked from this process, which must have one thread and must have run no tensor operation.
    """
    arguments = megatron_arguments(recipe)
    require_runnable(arguments)
    settings = settings_of(arguments)
    if rendezvous is not None:
        if rendezvous.world_size != settings.world_size:
            raise BadInputError(
                f"{rendezvous.world_size} ranks were started and the recipe has {settings.world_size}; "
                "start as many, or name another layout with --set parallel.num_gpus=N"
            )
        return work(rendezvous, None)
    if settings.device is not None:
        raise MissingRequirementError(
            f"{settings.world_size} GPU ranks need a launcher: start them with torchrun or srun"
        )

    def forked(seat: Seat) -> Result:
        return work(seat.rendezvous, seat.listen_fd)

    first, *_ = run_forked(settings.world_size, forked, on_progress=lambda content: None)
    return first


def told_by_one(value: float | None) -> float:
    """What exactly one rank, or several with the same, knows, on all of them. A collective call of all ranks.

    `value` is not negative; None says that this rank does not know it.
    """
    device = torch.cuda.current_device()
    known = torch.tensor([-1.0 if value is None else value], dtype=torch.float64, device=device)
    distributed.all_reduce(known, op=distributed.ReduceOp.MAX)
    return float(known)
