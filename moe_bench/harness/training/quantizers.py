"""Quantisers in a model that learns, or has learned, with them; nvidia-modelopt is loaded for no other."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from moe_bench.harness.batches import Device, MicroBatch
from moe_bench.harness.build import Training
from moe_bench.harness.settings import Settings
from moe_bench.harness.step import loss_of

Calibration = Iterable[list[MicroBatch]]
"""Global batches that a model sees before its first step."""


def put_quantizers(
    built: Training, settings: Settings, *, device: Device, calibration: Callable[[], Calibration] | None
) -> None:
    """As the recipe says; nothing without `quantization`. A collective call of all ranks.

    `calibration` None leaves the scales to a checkpoint. Scales of whole tensors then stay as they are while
    the weights move: those of blocks follow them (modelopt's dynamic block quantisation).

    Raises MeasurementError where the experts of some rank meet no token.
    """
    if settings.quantization_format is None:
        return
    from moe_bench.harness.quantize.model import quantize_chunks

    quantize_chunks(
        built.chunks,
        settings.quantization_format,
        experts_only=settings.quantizes_experts_only,
        device=device,
        calibrate=None if calibration is None else partial(_see, built, calibration),
    )


def _see(built: Training, calibration: Callable[[], Calibration]) -> None:
    for batches in calibration():
        loss_of(built, batches)
