"""Batches of real text by Megatron-Core's dataset: global sample i is the same in every layout."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import distributed

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.harness.batches import BatchPlan, MicroBatch, step_batches
from moe_bench.harness.data.tokenizer import Tokenizer
from moe_bench.spec.training import TrainingJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """Samples to train on and to validate with: a sequence and the token after its end each."""

    train: Any
    """GPTDataset of as many samples as the whole run draws, documents shuffled epoch by epoch."""
    valid: Any

    def train_batches(self, plan: BatchPlan, step: int) -> list[MicroBatch]:
        """The micro batches of training step `step`, counted from 0, of the rank that `plan` is of."""
        return step_batches(plan, step, draw=partial(_tokens, self.train, plan, step))

    def valid_batches(self, plan: BatchPlan, batch: int) -> list[MicroBatch]:
        """Those of validation batch `batch`, counted from 0."""
        return step_batches(plan, batch, draw=partial(_tokens, self.valid, plan, batch))


def read_text(job: TrainingJob, tokenizer: Tokenizer, *, cache: Path) -> Text:
    """The datasets of `job`. A collective call of all ranks.

    Megatron-Core's indices of documents and samples are kept in the folder `cache`.

    Raises BadInputError where a split has no whole sample, MissingRequirementError where the disk refuses.
    """
    recipe = job.plan.recipe
    _require_whole_samples(job)
    batch = recipe.global_batch_size
    sizes = [job.num_steps * batch, job.validation.num_batches * batch, 0]
    train_percent = 100 * (1 - job.validation_fraction)
    with _named_when_whole(cache) as unfinished:
        config = GPTDatasetConfig(
            random_seed=recipe.seed,
            sequence_length=recipe.seq_len,
            blend=([job.data], None),
            split=f"{train_percent:.6f},{100 - train_percent:.6f},0",
            path_to_cache=str(unfinished),
            tokenizer=tokenizer.library,
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
        )
        train, valid, _ = BlendedMegatronDatasetBuilder(_Indexed, sizes, lambda: True, config).build()
    return Text(train=train, valid=valid)


class _Indexed(GPTDataset):  # type: ignore[misc]
    """Megatron-Core's dataset, which says what the system says where its indices cannot be written."""

    def __init__(self, *arguments: Any) -> None:
        try:
            super().__init__(*arguments)
        except OSError as error:  # the builder makes a plain Exception of it (build_generic_dataset)
            config: GPTDatasetConfig = arguments[-1]
            raise MissingRequirementError(
                f"{Path(config.path_to_cache).parent}: the order of samples could not be written "
                f"({error.strerror or error}); make room"
            ) from error


@contextlib.contextmanager
def _named_when_whole(cache: Path) -> Iterator[Path]:
    """Lend a folder that knows what is in `cache`, and move what is made in it there when the block ends.

    A collective call of all ranks. Megatron-Core writes its files under the names by which it finds them
    (gpt_dataset.py, _build_document_sample_shuffle_indices): one that a kill cut short would be read.
    """
    unfinished = cache.with_name(f".{cache.name}.unfinished")
    is_first = not distributed.is_initialized() or distributed.get_rank() == 0
    if is_first:
        shutil.rmtree(unfinished, ignore_errors=True)
        for folder in (cache, unfinished):
            folder.mkdir(parents=True, exist_ok=True)
        for whole in cache.iterdir():
            (unfinished / whole.name).symlink_to(whole.resolve())
    try:
        yield unfinished
        if distributed.is_initialized():
            distributed.barrier()  # all have opened them
        for made in unfinished.iterdir() if is_first else ():
            if not made.is_symlink():
                made.replace(cache / made.name)
    finally:
        if is_first:
            shutil.rmtree(unfinished, ignore_errors=True)


def _require_whole_samples(job: TrainingJob) -> None:
    """Raise BadInputError where a part has less than one sample: Megatron-Core would look for it for ever."""
    dataset = IndexedDataset(job.data)  # whose end would take the memory of its arrays with it
    lengths = dataset.sequence_lengths
    cut = num_training_documents(len(lengths), job.validation_fraction)
    if min(int(lengths[:cut].sum()), int(lengths[cut:].sum())) <= job.plan.recipe.seq_len:
        raise _too_little(job)


def num_training_documents(num_documents: int, validation_fraction: float) -> int:
    """Where Megatron-Core cuts (blended_megatron_dataset_builder.py, _get_split_indices)."""
    return round(num_documents * (1 - validation_fraction))


def _too_little(job: TrainingJob) -> BadInputError:
    return BadInputError(
        f"{job.data}: too few documents for sequences of {job.plan.recipe.seq_len} tokens to train on and "
        f"{job.validation_fraction:.1%} to validate with; use more text, more documents (data build --split "
        "paragraph) or --valid-fraction"
    )


def _tokens(dataset: Any, plan: BatchPlan, step: int, index: int) -> torch.Tensor:
    """Sample `index` of a global batch: int64 [seq_len + 1]."""
    batch_size = plan.data_size * plan.num_micro_batches * plan.micro_batch_size
    sample = dataset[step * batch_size + index]
    return torch.cat([sample["tokens"], sample["labels"][-1:]])
