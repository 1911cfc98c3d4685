"""Quantises a model with calibration batches on all its ranks, and compares it with itself as it was."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from megatron.core.utils import unwrap_model
from torch import distributed

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness.all_ranks import Place, on_all_ranks
from moe_bench.harness.batches import BatchPlan, Device, MicroBatch, step_batches
from moe_bench.harness.build import Training, model_chunks, set_seeds, transformer_config, without_optimizer
from moe_bench.harness.data.build import read_manifest
from moe_bench.harness.data.tokenizer import tokenizer_of
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.quantize.compare import Comparison, compare
from moe_bench.harness.quantize.model import hold_packed, largest_values, quantized_keys
from moe_bench.harness.quantize.packed import FP8_KERNELS
from moe_bench.harness.quantize.sizes import PartOfRank, merged, rank_parts
from moe_bench.harness.rank import batch_plan, joined
from moe_bench.harness.settings import Settings, settings_of
from moe_bench.harness.training.checkpoint import load_checkpoint
from moe_bench.harness.training.data import read_text
from moe_bench.harness.training.loaded import OTHER_LAYOUT
from moe_bench.harness.training.quantizers import put_quantizers
from moe_bench.harness.weights import initialise_by_name
from moe_bench.results.quantization import Quantization
from moe_bench.spec.derive_training import require_vocabulary
from moe_bench.spec.quantization import QuantizeJob
from moe_bench.spec.rendezvous import Rendezvous

Steps = list[list[MicroBatch]]
"""The micro batches of this rank, global batch by global batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantized:
    """What all ranks found together."""

    report: Quantization
    largest: Mapping[str, float]
    """Of every quantiser that has one: `quantize.model.largest_values`."""
    keys: frozenset[str]
    """Of the rounded weights, in a checkpoint."""


def quantize(job: QuantizeJob, checkpoint: Path | None, *, rendezvous: Rendezvous | None) -> Quantized:
    """Quantise the model of `job`, with the weights of `checkpoint` or random ones, on all its ranks.

    With a `rendezvous` this process is one rank; without one, and without a GPU, they are forked from it.
    Raises BadInputError where data or checkpoint do not fit the model, MeasurementError where a loss is not
    finite or no layer can be quantised, MissingRequirementError where real products do not run here.
    """
    if job.text is not None:
        require_vocabulary(job.plan, read_manifest(Path(job.text.data)).tokenizer, job.text.data)
    if job.arithmetic == "real":
        _require_fp8_products()
    work = partial(quantize_rank, job, checkpoint)
    return on_all_ranks(job.plan.recipe, work, rendezvous=rendezvous, remedy=OTHER_LAYOUT)


def quantize_rank(job: QuantizeJob, checkpoint: Path | None, place: Place) -> Quantized:
    """The same as one of them."""
    with quantized_model(job, checkpoint, place) as (model, evaluation):
        found = _RankFound(
            comparison=compare(model, evaluation),
            parts=rank_parts(model.chunks, job.asked.format, experts_only=job.asked.experts_only),
            largest=largest_values(model.chunks),
            keys=quantized_keys(model.chunks),
        )
        dtype = str(next(model.chunks[0].parameters()).dtype).removeprefix("torch.")
        gpu = job.plan.recipe.system.gpu
        where = "the CPU" if gpu is None else gpu.device_name
        return _together(
            job,
            found.of_all_ranks(),
            dtype=dtype,
            rounded_by=f"nvidia-modelopt {version('nvidia-modelopt')} on {where}",
        )


def _require_fp8_products() -> None:
    """Of this process's GPU, whatever the recipe calls it."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        raise MissingRequirementError(
            "--arithmetic real: torch compiles its grouped FP8 product for compute capability 9.0, which no "
            "GPU here has; leave it at simulated, or pack the weights with --arithmetic packed"
        )


@contextlib.contextmanager
def quantized_model(
    job: QuantizeJob, checkpoint: Path | None, place: Place
) -> Iterator[tuple[Training, Steps]]:
    """This rank's part of the model with its quantisers calibrated, and the batches that judge it.

    A collective call of all ranks.
    """
    arguments = megatron_arguments(job.plan.recipe)
    settings = settings_of(arguments)
    with joined(arguments, settings, place.rendezvous, listen_fd=place.listen_fd) as (device, _):
        config = transformer_config(arguments)
        set_seeds(settings.seed)
        chunks = model_chunks(arguments, settings, config, device=device)
        model = without_optimizer(config, chunks, device=device)
        plan = batch_plan(settings, vocab_size=cast(int, arguments.model["vocab_size"]), device=device)
        calibration, evaluation = _batches(job, plan)
        _fill_and_quantize(model, job, checkpoint, calibration, settings, device=device)
        yield model, evaluation


@dataclass(frozen=True, slots=True, kw_only=True)
class _RankFound:
    """What one rank knows."""

    comparison: Comparison | None
    """None but on the last pipeline stage."""
    parts: tuple[PartOfRank, ...]
    largest: Mapping[str, float]
    keys: frozenset[str]

    def of_all_ranks(self) -> list[_RankFound]:
        """In the order of the ranks. A collective call of all ranks."""
        found: list[Any] = [None] * distributed.get_world_size()
        distributed.all_gather_object(found, self)
        return found


def _fill_and_quantize(
    model: Training,
    job: QuantizeJob,
    checkpoint: Path | None,
    calibration: Steps,
    settings: Settings,
    *,
    device: Device,
) -> None:
    """Weights first, of which scales are taken; or quantisers first, where the checkpoint has scales."""
    has_scales = checkpoint is not None and job.is_calibrated
    if checkpoint is None and device == "cpu":
        initialise_by_name(
            unwrap_model(list(model.chunks)), std=model.config.init_method_std, seed=settings.seed
        )
    if checkpoint is not None and not has_scales:
        load_checkpoint(model, checkpoint, with_optimizer=False)
    put_quantizers(model, settings, device=device, calibration=None if has_scales else lambda: calibration)
    if checkpoint is not None and has_scales:
        load_checkpoint(model, checkpoint, with_optimizer=False)
    if job.arithmetic != "simulated":
        hold_packed(model.chunks, job.asked.format, arithmetic=job.arithmetic)


def _together(job: QuantizeJob, found: list[_RankFound], *, dtype: str, rounded_by: str) -> Quantized:
    keys = frozenset[str]().union(*(one.keys for one in found))
    if not keys:
        raise BadInputError(
            f"{job.asked.format}: no layer of {job.plan.recipe.model.key} on a rank of this layout can be "
            "cut into its blocks; name another format"
        )
    comparison = next(one.comparison for one in found if one.comparison is not None)
    comparison.require_finite()
    report = Quantization(
        format=job.asked.format,
        original_dtype=dtype,
        simulated_by=rounded_by,
        arithmetic=job.arithmetic,
        kernels=FP8_KERNELS if job.arithmetic == "real" else None,
        kl_from_simulated=comparison.kl_from_simulated,
        num_ranks=len(found),
        num_tokens=comparison.num_tokens,
        loss=comparison.loss,
        quantized_loss=comparison.quantized_loss,
        kl_divergence=comparison.kl_divergence,
        same_choice_fraction=comparison.same_choice_fraction,
        parts=merged(part for one in found for part in one.parts),
    )
    largest = {key: value for one in found for key, value in one.largest.items()}
    return Quantized(report=report, largest=largest, keys=keys)


def _batches(job: QuantizeJob, plan: BatchPlan) -> tuple[Steps, Steps]:
    """What calibrates and what judges: of text its training part and its held-out part."""
    num_first, num_second = job.asked.num_calibration_batches, job.num_evaluation_batches
    if job.text is None:
        steps = [step_batches(plan, step) for step in range(num_first + num_second)]
        return steps[:num_first], steps[num_first:]
    with _folder_of_all_ranks(Path(job.text.data).parent) as cache:
        tokenizer = tokenizer_of(read_manifest(Path(job.text.data)).tokenizer)
        text = read_text(job.text, tokenizer, cache=cache)
        return (
            [text.train_batches(plan, step) for step in range(num_first)],
            [text.valid_batches(plan, batch) for batch in range(num_second)],
        )


@contextlib.contextmanager
def _folder_of_all_ranks(parent: Path) -> Iterator[Path]:
    """A new folder that every rank sees, as it sees the dataset beside it; removed when the block ends."""
    said: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            said = [tempfile.mkdtemp(prefix=".quantize-", dir=parent)]
        except OSError as error:
            said = [error]
    distributed.broadcast_object_list(said)
    if isinstance(said[0], OSError):
        raise BadInputError(f"{parent}: {said[0].strerror}; the dataset needs room for an index beside it")
    folder = Path(said[0])
    try:
        yield folder
        distributed.barrier()
    finally:
        if distributed.get_rank() == 0:
            shutil.rmtree(folder, ignore_errors=True)
