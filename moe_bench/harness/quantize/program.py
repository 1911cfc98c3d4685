"""Quantises a model with calibration batches, and compares it with itself as it was."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import cast

import modelopt.torch.quantization as mtq
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import unwrap_model
from modelopt.torch.quantization.nn import QuantModule, TensorQuantizer
from torch import Tensor

from moe_bench.errors import MeasurementError
from moe_bench.harness.batches import BatchPlan, MicroBatch, step_batches
from moe_bench.harness.build import model_chunks, set_seeds, transformer_config, without_optimizer
from moe_bench.harness.data.build import read_manifest
from moe_bench.harness.data.tokenizer import tokenizer_of
from moe_bench.harness.kernels.mla import DuplicatedLinear
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.quantize.formats import EXPERTS, KEPT, STORAGE, block_misfit, modelopt_config
from moe_bench.harness.quantize.layers import register_layers
from moe_bench.harness.quantize.weights import load_weights
from moe_bench.harness.rank import batch_plan, joined
from moe_bench.harness.requirements import require_runnable
from moe_bench.harness.settings import settings_of
from moe_bench.harness.training.data import read_text
from moe_bench.harness.weights import initialise_by_name
from moe_bench.harness.workers import Seat, run_forked
from moe_bench.results.quantization import PartSize, Quantization
from moe_bench.spec.derive_training import require_vocabulary
from moe_bench.spec.quantization import QuantFormat, QuantizeJob

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def quantize(job: QuantizeJob, checkpoint: Path | None) -> Quantization:
    """Quantise the model of `job`, with the weights of `checkpoint` or random ones, in a forked process.

    This process must have one thread and must have run no tensor operation. Raises BadInputError where data
    or checkpoint do not fit the model, MeasurementError where a loss is not finite.
    """
    require_runnable(megatron_arguments(job.plan.recipe))
    if job.text is not None:
        require_vocabulary(job.plan, read_manifest(Path(job.text.data)).tokenizer, job.text.data)
    (found,) = run_forked(1, partial(quantize_rank, job, checkpoint), on_progress=lambda content: None)
    return found


def quantize_rank(job: QuantizeJob, checkpoint: Path | None, seat: Seat) -> Quantization:
    """The same in this process, which is the only rank."""
    arguments = megatron_arguments(job.plan.recipe)
    settings = settings_of(arguments)
    with joined(arguments, settings, seat.rendezvous, listen_fd=seat.listen_fd) as (device, _):
        config = transformer_config(arguments)
        set_seeds(settings.seed)
        built = without_optimizer(
            config, model_chunks(arguments, settings, config, device=device), device=device
        )
        (chunk,) = built.chunks
        (model,) = unwrap_model([chunk])
        if checkpoint is None:
            initialise_by_name([model], std=config.init_method_std, seed=settings.seed)
        else:
            load_weights(model, job.plan.recipe, checkpoint, device=device)
        chunk.eval()
        plan = batch_plan(settings, vocab_size=cast(int, arguments.model["vocab_size"]), device=device)
        calibration, evaluation = _batches(job, plan)
        quantize_model(
            model,
            job.format,
            experts_only=job.experts_only,
            calibrate=lambda: [logits_of(chunk, batch) for batch in calibration],
        )
        comparison = compare(chunk, quantizers(model), evaluation)
        comparison.require_finite()
        return Quantization(
            format=job.format,
            original_dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            simulated_by=f"nvidia-modelopt {version('nvidia-modelopt')} on the CPU",
            num_tokens=comparison.num_tokens,
            loss=comparison.loss,
            quantized_loss=comparison.quantized_loss,
            kl_divergence=comparison.kl_divergence,
            same_choice_fraction=comparison.same_choice_fraction,
            parts=tuple(part_sizes(model, job.format, experts_only=job.experts_only)),
        )


def quantize_model(
    model: torch.nn.Module, format: QuantFormat, *, experts_only: bool, calibrate: Callable[[], object]
) -> None:
    """Put quantisers before the weights and inputs of linear layers, and let `calibrate` show them inputs.

    Raises MeasurementError where no layer is left to quantise.
    """
    register_layers()
    misfits = [
        name
        for name, module in model.named_modules()
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | DuplicatedLinear)
        and module.weight is not None
        and block_misfit(module.weight, format) is not None
    ]
    config = modelopt_config(format, experts_only=experts_only, left_out=misfits)
    with contextlib.redirect_stdout(sys.stderr):  # modelopt prints how many quantisers it made
        mtq.quantize(model, config, lambda _: calibrate())
    if not quantizers(model):
        raise MeasurementError(f"{format}: no layer of this model can be quantised; name another format")


def quantizers(model: torch.nn.Module) -> list[TensorQuantizer]:
    """Those that are on."""
    return [module for module in model.modules() if isinstance(module, TensorQuantizer) and module.is_enabled]


def _batches(job: QuantizeJob, plan: BatchPlan) -> tuple[list[MicroBatch], list[MicroBatch]]:
    """What calibrates and what judges: of text its training part and its held-out part."""
    num_first, num_second = job.num_calibration_batches, job.num_evaluation_batches
    if job.text is None:
        steps = [step_batches(plan, step) for step in range(num_first + num_second)]
        return _flat(steps[:num_first]), _flat(steps[num_first:])
    with tempfile.TemporaryDirectory() as cache:
        tokenizer = tokenizer_of(read_manifest(Path(job.text.data)).tokenizer)
        text = read_text(job.text, tokenizer, cache=Path(cache))
        return (
            _flat(text.train_batches(plan, step) for step in range(num_first)),
            _flat(text.valid_batches(plan, batch) for batch in range(num_second)),
        )


def _flat(steps: Iterable[list[MicroBatch]]) -> list[MicroBatch]:
    return [batch for step in steps for batch in step]


@torch.no_grad()  # type: ignore[untyped-decorator]
def logits_of(chunk: torch.nn.Module, batch: MicroBatch) -> Tensor:
    """float32 [micro batch, sequence, vocabulary]."""
    logits: Tensor = chunk(batch["tokens"], batch["position_ids"], None)
    return logits.float()


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Means over tokens, in nats."""

    num_tokens: int
    loss: float
    quantized_loss: float
    kl_divergence: float
    same_choice_fraction: float

    def require_finite(self) -> None:
        """Raise MeasurementError where a model says no number."""
        if not torch.tensor([self.loss, self.quantized_loss, self.kl_divergence]).isfinite().all():
            raise MeasurementError("a loss is not finite; look at the checkpoint with moe-bench train --from")


def compare(
    chunk: torch.nn.Module, switched: list[TensorQuantizer], batches: Iterable[MicroBatch]
) -> Comparison:
    """The model with its quantisers off and on; they are on afterwards."""
    sums = torch.zeros(5, dtype=torch.float64)
    for batch in batches:
        before, after = (logits_of(chunk, batch).log_softmax(dim=-1) for _ in _off_then_on(switched))
        labels, mask = batch["labels"].unsqueeze(-1), batch["loss_mask"]
        per_token = (
            torch.ones_like(mask),
            -before.gather(-1, labels).squeeze(-1),
            -after.gather(-1, labels).squeeze(-1),
            (before.exp() * (before - after)).sum(dim=-1),
            (before.argmax(dim=-1) == after.argmax(dim=-1)).float(),
        )
        sums += torch.stack([(values * mask).double().sum() for values in per_token])
    num_tokens, *totals = sums.tolist()
    loss, quantized_loss, kl_divergence, same_choice = (total / num_tokens for total in totals)
    return Comparison(
        num_tokens=int(num_tokens),
        loss=loss,
        quantized_loss=quantized_loss,
        kl_divergence=kl_divergence,
        same_choice_fraction=same_choice,
    )


def _off_then_on(switched: list[TensorQuantizer]) -> Iterator[None]:
    for quantizer in switched:
        quantizer.disable()
    yield
    for quantizer in switched:
        quantizer.enable()
    yield


def part_sizes(model: torch.nn.Module, format: QuantFormat, *, experts_only: bool) -> Iterator[PartSize]:
    """The weights of a quantised model, alike modules together; a tied weight is counted once."""
    alike: dict[tuple[str, str | None], list[tuple[int, int, int]]] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = [one for one in module.parameters(recurse=False) if id(one) not in seen]
        seen |= {id(one) for one in own}
        if own:
            reason = _left_out_because(name, module, format, experts_only=experts_only)
            sizes = [_size(one, format, is_quantized=reason is None and one.dim() > 1) for one in own]
            total = (sum(one.numel() for one in own), sum(sizes), sum(one.nbytes for one in own))
            alike.setdefault((_NUMBER.sub("*", name), reason), []).append(total)
    for (name, reason), totals in alike.items():
        num_params, num_bytes, original_bytes = map(sum, zip(*totals, strict=True))
        yield PartSize(
            name=name,
            num_modules=len(totals),
            num_params=num_params,
            num_bytes=num_bytes,
            original_bytes=original_bytes,
            left_out_because=reason,
        )


def _size(parameter: Tensor, format: QuantFormat, *, is_quantized: bool) -> int:
    return STORAGE[format].num_bytes(parameter.numel()) if is_quantized else parameter.nbytes


def _left_out_because(
    name: str, module: torch.nn.Module, format: QuantFormat, *, experts_only: bool
) -> str | None:
    """None for a module whose weight is quantised, as its quantiser says."""
    quantizer = getattr(module, "weight_quantizer", None)
    if isinstance(module, QuantModule) and quantizer is not None and quantizer.is_enabled:
        return None
    for beginning, why in KEPT.items():
        if name.startswith(beginning):
            return why
    if not isinstance(module, QuantModule) or quantizer is None:
        return "not a linear layer that modelopt knows"
    if experts_only and EXPERTS not in f"{name}.":
        return "not a routed expert"
    return block_misfit(module.weight, format) or "modelopt's default leaves it out"
