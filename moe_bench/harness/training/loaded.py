"""A model with the weights of a checkpoint on each rank of a layout, for what learns nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import distributed

from moe_bench.harness.adapters import adapters_of
from moe_bench.harness.all_ranks import Place
from moe_bench.harness.batches import BatchPlan
from moe_bench.harness.build import Training, model_chunks, set_seeds, transformer_config, without_optimizer
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.rank import batch_plan, joined
from moe_bench.harness.settings import settings_of
from moe_bench.harness.training.checkpoint import load_checkpoint, lora_rank
from moe_bench.harness.training.quantizers import put_quantizers
from moe_bench.spec.recipe import Recipe

OTHER_LAYOUT = "name another layout with --set parallel.num_gpus=N"
"""What else to do where another number of ranks was started than the recipe has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """One rank's part of the model, and what it reads."""

    model: Training
    plan: BatchPlan
    num_steps: int
    """Steps that the weights have taken."""


@contextlib.contextmanager
def loaded(recipe: Recipe, checkpoint: Path, place: Place) -> Iterator[Loaded]:
    """Hold the model of `recipe` with the weights of `checkpoint`, whatever layout saved them.

    A collective call of all ranks. Raises BadInputError with the tensor's name where they do not fit.
    """
    arguments = megatron_arguments(recipe)
    settings = settings_of(arguments)
    rank = lora_rank(checkpoint)
    adapt = None if rank is None else adapters_of(rank)
    with joined(arguments, settings, place.rendezvous, listen_fd=place.listen_fd) as (device, _):
        config = transformer_config(arguments)
        set_seeds(settings.seed)
        chunks = model_chunks(arguments, settings, config, device=device)
        if adapt is not None:
            adapt(chunks)
        model = without_optimizer(config, chunks, device=device)
        put_quantizers(model, settings, device=device, calibration=None)
        progress = load_checkpoint(model, checkpoint, with_optimizer=False)
        vocab_size = cast(int, arguments.model["vocab_size"])
        yield Loaded(
            model=model,
            plan=batch_plan(settings, vocab_size=vocab_size, device=device),
            num_steps=progress.num_steps,
        )


def told_by_one(value: float | None) -> float:
    """What exactly one rank, or several with the same, knows, on all of them. A collective call of all ranks.

    `value` is not negative; None says that this rank does not know it.
    """
    device = torch.cuda.current_device()
    known = torch.tensor([-1.0 if value is None else value], dtype=torch.float64, device=device)
    distributed.all_reduce(known, op=distributed.ReduceOp.MAX)
    return float(known)
