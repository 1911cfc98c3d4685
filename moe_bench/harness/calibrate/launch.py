"""The host's time to start kernels: one call after another, and through layers of Megatron-Core."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from moe_bench.errors import MeasurementError
from moe_bench.harness.calibrate.inputs import normal
from moe_bench.results.calibration_tasks import LAUNCHED_LAYERS, MIN_SAMPLES, NUM_WARMUP
from moe_bench.spec.recipe import Recipe

FEW_LAYERS = 2


def bare_samples_s(num_kernels: int, *, device: str) -> tuple[float, ...]:
    """Seconds to queue `num_kernels` additions of one number each, without waiting for them.

    Fewer than the 1,024 that a stream of CUDA queues before the host has to wait.
    """
    x = normal(1, dtype=torch.float32, device=device)
    samples = []
    for _ in range(NUM_WARMUP + MIN_SAMPLES):
        _synchronize(device)
        start_s = time.perf_counter()
        for _ in range(num_kernels):
            x.add_(1.0)
        samples.append(time.perf_counter() - start_s)
    _synchronize(device)
    return tuple(samples[NUM_WARMUP:])


def layers_samples_s(toy: Callable[[int], Recipe]) -> tuple[float, ...]:
    """Seconds of LAUNCHED_LAYERS layers of Megatron-Core, forward and backward.

    `toy` gives the recipe with so many layers. Two models are timed in turn, and what the larger takes longer
    is that of its layers: embedding, loss and the rest are the same. At toy widths a GPU is done with each
    kernel before the host has started the next one.
    Raises MeasurementError where the larger model is not the slower one.
    """
    # the larger one first: Megatron-Core's record of auxiliary losses is as long as the first model it sees
    recipes = [toy(num_layers) for num_layers in (FEW_LAYERS + LAUNCHED_LAYERS, FEW_LAYERS)]
    with _steps(recipes) as (many, few):
        pairs = [(many(), few()) for _ in range(NUM_WARMUP + MIN_SAMPLES)]
    samples = tuple(many_s - few_s for many_s, few_s in pairs[NUM_WARMUP:])
    if min(samples) <= 0:
        raise MeasurementError(f"{LAUNCHED_LAYERS} layers more took no longer; the machine is not idle")
    return samples


@contextlib.contextmanager
def _steps(recipes: list[Recipe]) -> Iterator[list[Callable[[], float]]]:
    """For each recipe, what runs a micro batch forward and backward alone and returns its seconds."""
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker

    from moe_bench.harness.batches import step_batches
    from moe_bench.harness.loopback import loopback_groups
    from moe_bench.harness.mcore_config import megatron_arguments
    from moe_bench.harness.rank import batch_plan, build, machine
    from moe_bench.harness.settings import settings_of
    from moe_bench.spec.rendezvous import Rendezvous

    alone = Rendezvous(rank=0, world_size=1, local_rank=0, master_addr="localhost", master_port=1)
    several = [megatron_arguments(recipe) for recipe in recipes]
    settings = settings_of(several[0])
    with (
        machine(settings, alone) as (device, _),
        _without_warnings_of_generators(),
        loopback_groups(
            world_size=1, rank=0, sizes=several[0].parallel_state, on_transfer=lambda transfer: None
        ),
    ):
        vocab_size = recipes[0].model.vocab_size
        batch, *_ = step_batches(batch_plan(settings, vocab_size=vocab_size, device=device), 0)
        trainings = [build(arguments, settings_of(arguments), device=device) for arguments in several]
        try:
            yield [_timed_step(training.chunks[0], batch, device) for training in trainings]
        finally:
            destroy_moe_metrics_tracker()


@contextlib.contextmanager
def _without_warnings_of_generators() -> Iterator[None]:
    """On a CPU one generator is all there is, and Megatron-Core warns whenever it is drawn from."""
    noisy = logging.getLogger("megatron.core.tensor_parallel.random")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        yield
    finally:
        noisy.setLevel(level)


def _timed_step(chunk: Any, batch: Any, device: str) -> Callable[[], float]:
    def step() -> float:
        chunk.zero_grad_buffer()
        _synchronize(device)
        start_s = time.perf_counter()
        with chunk.no_sync():
            losses = chunk(
                batch["tokens"],
                batch["position_ids"],
                None,
                labels=batch["labels"],
                loss_mask=batch["loss_mask"],
            )
            losses.sum().backward()
        _synchronize(device)
        return time.perf_counter() - start_s

    return step


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
