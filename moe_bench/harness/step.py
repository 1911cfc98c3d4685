"""One training step through Megatron-Core's pipeline schedule: forward, backward, reduction, optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from moe_bench.harness.batches import MicroBatch
from moe_bench.harness.build import Training
from moe_bench.harness.draws import begin_micro_batch


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutcome:
    """What one step left on this rank, some of it still on the device."""

    loss: torch.Tensor | None
    """Mean language-model loss over the global batch, a scalar; None but on the last pipeline stage."""
    grad_norm: float | None
    """Over the whole model, before clipping; None where nothing is clipped and so none was computed."""
    was_applied: bool
    """Whether the optimizer took the step; it does not where gradients are not finite."""


Schedule = Callable[..., list[dict[str, torch.Tensor]]]
"""Megatron-Core's forward_backward_func, or what captures it."""


def _nothing() -> None:
    """Nobody asked where the schedule begins and ends."""


def train_step(
    training: Training,
    micro_batches: list[MicroBatch],
    *,
    on_schedule: Callable[[], None] = _nothing,
    schedule: Schedule | None = None,
) -> StepOutcome:
    """Run one optimizer step over `micro_batches`, through `schedule` where it is not Megatron-Core's own.

    A collective call of all ranks.

    `on_schedule` is called as the schedule, all forward and backward passes with their reductions, begins and
    again as it ends.
    """
    for chunk in training.chunks:
        chunk.zero_grad_buffer()
    training.optimizer.zero_grad()
    _stage_weights(training)
    on_schedule()
    losses = _scheduled(training, micro_batches, forward_only=False, schedule=schedule)
    on_schedule()
    was_applied, grad_norm, _ = training.optimizer.step()
    return StepOutcome(
        loss=_mean_loss(losses),
        grad_norm=float(grad_norm) if training.optimizer.config.clip_grad > 0 else None,
        was_applied=bool(was_applied),
    )


@torch.no_grad()  # type: ignore[untyped-decorator]
def loss_of(training: Training, micro_batches: list[MicroBatch]) -> torch.Tensor | None:
    """Mean language-model loss over a global batch, without dropout and without learning from it.

    A scalar; None but on the last pipeline stage. A collective call of all ranks.
    """
    for chunk in training.chunks:
        chunk.eval()
    _stage_weights(training)
    try:
        return _mean_loss(_scheduled(training, micro_batches, forward_only=True))
    finally:
        for chunk in training.chunks:
            chunk.train()


def _stage_weights(training: Training) -> None:
    """Put updated weights where the forward pass gathers them from, if that is the gradients' own memory.

    MXFP8 weights whose gathering overlaps with computing are left to the training loop: the optimizer does
    not write them, and zeroed gradients would be gathered in their place (optimizer/optimizer.py:800;
    Megatron-LM's train_step). Elsewhere nothing is done.
    """
    if training.optimizer is not None:
        training.optimizer.prepare_model_params_for_param_sync()


def _scheduled(
    training: Training,
    micro_batches: list[MicroBatch],
    *,
    forward_only: bool,
    schedule: Schedule | None = None,
) -> list[dict[str, torch.Tensor]]:
    """What the losses of the micro batches report, through Megatron-Core's pipeline schedule."""
    micro_batch_size, seq_len = micro_batches[0]["tokens"].shape
    iterators = [iter(micro_batches) for _ in training.chunks]
    run: Schedule = schedule or get_forward_backward_func()
    # a graph registers every state of the tracker as a generator's, and a number of a sample is none
    draws = training.config.cuda_graph_impl == "none"
    return run(
        forward_step_func=partial(_forward_step, draws=draws),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=list(training.chunks),
        num_microbatches=len(micro_batches),
        seq_length=seq_len * parallel_state.get_context_parallel_world_size(),
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )


def _forward_step(
    micro_batches: Iterator[MicroBatch],
    model: Any,
    return_schedule_plan: bool = False,
    *,
    draws: bool = True,
) -> tuple[Any, Any]:
    """What the schedule calls for each micro batch and model chunk.

    `return_schedule_plan` is set where dispatch and combine run under another micro batch's computation.
    `draws` says whether routers may draw by token.
    """
    batch = next(micro_batches)
    if draws:
        begin_micro_batch(batch["first_sample"])
    run = model.build_schedule_plan if return_schedule_plan else model
    output = run(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(_sum_of_losses, batch["loss_mask"])


def _sum_of_losses(
    loss_mask: torch.Tensor, losses: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss of one micro batch as the schedule wants it: sum, number of tokens, what to report.

    The schedule divides the sum in place (pipeline_parallel/schedules.py, forward_step_calc_loss), so what is
    reported is a copy.
    """
    total = (losses.float() * loss_mask).sum()
    num_tokens = loss_mask.sum().to(torch.int)
    report = torch.stack((total.detach(), num_tokens.to(total.dtype)))
    return total, num_tokens, {"sum_and_tokens": report}


def _mean_loss(losses: list[dict[str, torch.Tensor]]) -> torch.Tensor | None:
    """Mean over the micro batches of all data and context ranks; None where the schedule gave none."""
    if not losses:
        return None
    total = torch.stack([loss["sum_and_tokens"] for loss in losses]).sum(dim=0)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(total, group=group)
    return total[0] / total[1]
