"""A quantised model held against itself as it was, on the same tokens and on all ranks of a layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region
from torch import Tensor, distributed

from moe_bench.errors import MeasurementError
from moe_bench.harness.batches import MicroBatch
from moe_bench.harness.build import Training
from moe_bench.harness.quantize.model import passes
from moe_bench.harness.quantize.packed import held_weight

_NUM_SUMS = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Means over tokens, in nats."""

    num_tokens: int
    loss: float
    quantized_loss: float
    kl_divergence: float
    same_choice_fraction: float
    kl_from_simulated: float | None
    """Of the quantised model from its simulation; None where it is that."""

    def require_finite(self) -> None:
        """Raise MeasurementError where a model says no number."""
        if not torch.tensor([self.loss, self.quantized_loss, self.kl_divergence]).isfinite().all():
            raise MeasurementError("a loss is not finite; look at the checkpoint with moe-bench evaluate")


@torch.no_grad()  # type: ignore[untyped-decorator]
def compare(model: Training, steps: Iterable[Sequence[MicroBatch]]) -> Comparison | None:
    """The model with its quantisers off and on, over global batches; they are on afterwards.

    Where weights are held packed, those are the quantised model, and its simulation runs beside it. None but
    on the last pipeline stage. A collective call of all ranks.
    """
    for chunk in model.chunks:
        chunk.eval()
    device = torch.device(torch.cuda.current_device())
    sums = torch.zeros(_NUM_SUMS, dtype=torch.float64, device=device)
    for batches in steps:
        found = [_logits(model, batches) for _ in passes(model.chunks)]
        for batch, *logits in zip(batches, *found, strict=bool(found[0])):
            sums += _sums_over_tokens(batch, *(one.float().log_softmax(dim=-1) for one in logits))
    if not parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        return None
    distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    num_tokens, *totals = sums.tolist()
    loss, quantized_loss, kl_divergence, same_choice, kl_from_simulated = (
        total / num_tokens for total in totals
    )
    is_held = any(held_weight(module) is not None for chunk in model.chunks for module in chunk.modules())
    return Comparison(
        num_tokens=int(num_tokens),
        loss=loss,
        quantized_loss=quantized_loss,
        kl_divergence=kl_divergence,
        same_choice_fraction=same_choice,
        kl_from_simulated=kl_from_simulated if is_held else None,
    )


def _sums_over_tokens(
    batch: MicroBatch, before: Tensor, simulated: Tensor, held: Tensor | None = None
) -> Tensor:
    """Tokens, both losses, KL(before || after), choices that are the same, and KL(simulated || after).

    Of log probabilities; after is of the weights that are held packed, or else the simulation.
    """
    after = simulated if held is None else held
    labels, mask = batch["labels"].unsqueeze(-1), batch["loss_mask"]
    per_token = (
        torch.ones_like(mask),
        -before.gather(-1, labels).squeeze(-1),
        -after.gather(-1, labels).squeeze(-1),
        _divergence(before, after),
        (before.argmax(dim=-1) == after.argmax(dim=-1)).float(),
        torch.zeros_like(mask) if held is None else _divergence(simulated, held),
    )
    return torch.stack([(values * mask).double().sum() for values in per_token])


def _divergence(of: Tensor, other: Tensor) -> Tensor:
    """KL(of || other), of log probabilities."""
    return (of.exp() * (of - other)).sum(dim=-1)


def _logits(model: Training, batches: Sequence[MicroBatch]) -> list[Tensor]:
    """[micro batch, sequence, vocabulary] of each micro batch; none but on the last pipeline stage."""
    micro_batch_size, seq_len = batches[0]["tokens"].shape
    iterators = [iter(batches) for _ in model.chunks]
    found: list[Tensor] = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(model.chunks),
        num_microbatches=len(batches),
        seq_length=seq_len * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=micro_batch_size,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return found


def _forward_step(micro_batches: Iterator[MicroBatch], chunk: Any) -> tuple[Any, Any]:
    batch = next(micro_batches)
    return chunk(batch["tokens"], batch["position_ids"], None), _whole_vocabulary


def _whole_vocabulary(logits: Tensor, *, non_loss_data: bool) -> Tensor:
    whole: Tensor = gather_from_tensor_model_parallel_region(logits)
    return whole
