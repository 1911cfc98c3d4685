"""Synthetic tokens: global sample i is the same in every layout, so layouts can be compared loss by loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from megatron.core.utils import get_batch_on_this_cp_rank
from torch.nn.functional import pad

Device = Literal["cuda", "cpu"]
MicroBatch = dict[str, torch.Tensor]
"""`tokens`, `labels`, `position_ids`: int64 [micro batch, sequence]; `loss_mask`: float32, same shape.

`first_sample`: number of the first sequence, counted over all ranks and steps: int64 [], on the host."""
Draw = Callable[[int], torch.Tensor]
"""Sample i of a global batch: tokens of one sequence and the one after its end, int64 [seq_len + 1].

Of a shorter one the end is filled up, and no loss is taken there.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPlan:
    """What one rank reads in each step."""

    seed: int
    vocab_size: int
    seq_len: int
    micro_batch_size: int
    num_micro_batches: int
    data_rank: int
    data_size: int
    """Data-parallel ranks; context-parallel ranks share one batch."""
    context_group: Any
    """Process group over which each sequence is divided, in Megatron-Core's zigzag order."""
    device: Device


def step_batches(plan: BatchPlan, step: int, *, draw: Draw | None = None) -> list[MicroBatch]:
    """The micro batches of one step, on the device, of random tokens or of those that `draw` gives.

    Micro batch i of data rank r begins at global sample (i * data_size + r) * micro_batch_size: with
    micro batches of one sequence a step sees the same micro batches in all layouts.
    """
    given = draw or partial(_sample, plan, step)
    num_before = step * plan.data_size * plan.num_micro_batches * plan.micro_batch_size
    return [_micro_batch(plan, index, num_before, given) for index in range(plan.num_micro_batches)]


def _micro_batch(plan: BatchPlan, index: int, num_before: int, draw: Draw) -> MicroBatch:
    first = (index * plan.data_size + plan.data_rank) * plan.micro_batch_size
    drawn = [draw(first + offset) for offset in range(plan.micro_batch_size)]
    samples = torch.stack([pad(sample, (0, plan.seq_len + 1 - len(sample))) for sample in drawn])
    num_labels = torch.tensor([max(len(sample) - 1, 0) for sample in drawn])
    positions = torch.arange(plan.seq_len).expand(plan.micro_batch_size, -1).contiguous()
    batch = {
        "tokens": samples[:, :-1].contiguous(),
        "labels": samples[:, 1:].contiguous(),
        "position_ids": positions,
        "loss_mask": (positions < num_labels[:, None]).float(),
    }
    batch = {key: value.to(plan.device) for key, value in batch.items()}
    if plan.context_group.size() > 1:
        batch = get_batch_on_this_cp_rank(batch, False, plan.context_group)
    return batch | {"first_sample": torch.tensor(num_before + first)}


def _sample(plan: BatchPlan, step: int, sample: int) -> torch.Tensor:
    """Tokens of one sequence and the one after its end: int64 [seq_len + 1]."""
    generator = torch.Generator().manual_seed((plan.seed * 1_000_003 + step) * 1_000_003 + sample)
    return torch.randint(plan.vocab_size, (plan.seq_len + 1,), generator=generator)
