"""Where a run begins: weights, optimizer and quantisers, fresh or those of a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from moe_bench.harness.batches import Device, MicroBatch
from moe_bench.harness.build import Training
from moe_bench.harness.settings import Settings
from moe_bench.harness.training.checkpoint import Progress, load_checkpoint
from moe_bench.harness.training.quantizers import put_quantizers


def begun(
    built: Training,
    settings: Settings,
    checkpoint: Path | None,
    *,
    with_optimizer: bool,
    first_batches: Callable[[int], list[MicroBatch]],
) -> Progress:
    """Fill `built` and put in the quantisers of the recipe. A collective call of all ranks.

    A run that goes on, `with_optimizer`, takes its scales from the checkpoint; else they are calibrated on
    the weights that it begins with, and on the first global batches that it will train on.
    """
    device: Device = "cpu" if settings.device is None else "cuda"
    if checkpoint is not None and with_optimizer:
        put_quantizers(built, settings, device=device, calibration=None)
        return load_checkpoint(built, checkpoint)
    if checkpoint is not None:
        load_checkpoint(built, checkpoint, with_optimizer=False)
    steps = range(settings.num_calibration_batches)
    put_quantizers(built, settings, device=device, calibration=lambda: map(first_batches, steps))
    return Progress(num_steps=0)
