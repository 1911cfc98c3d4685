"""Loss of a checkpoint on a dataset: every token of it is predicted once, in any layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset

from moe_bench.errors import BadInputError, MeasurementError
from moe_bench.harness.all_ranks import Place, on_all_ranks
from moe_bench.harness.batches import BatchPlan, step_batches
from moe_bench.harness.data.build import read_manifest
from moe_bench.harness.step import loss_of
from moe_bench.harness.training.data import num_training_documents
from moe_bench.harness.training.loaded import OTHER_LAYOUT, Loaded, loaded, told_by_one
from moe_bench.results.evaluation import Evaluation
from moe_bench.spec.derive_training import require_vocabulary
from moe_bench.spec.rendezvous import Rendezvous
from moe_bench.spec.scale import Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What is to be evaluated on what."""

    plan: Plan
    checkpoint: Path
    data: str
    """Prefix of the dataset."""
    held_out_fraction: float | None
    """Of the documents, the last ones, which alone are read; None reads all."""


def evaluate(question: Question, *, rendezvous: Rendezvous | None) -> Evaluation:
    """Loss over the dataset, as the recipe evaluates: without dropout, with its capacity of evaluation.

    The text is cut into sequences of the recipe's length as it stands, one behind the other; the first token
    of a sequence is seen and, as the last label of the one before it, predicted.

    Raises BadInputError where data, checkpoint and recipe do not fit, MeasurementError where the loss is not
    finite.
    """
    require_vocabulary(question.plan, read_manifest(Path(question.data)).tokenizer, question.data)
    return on_all_ranks(
        question.plan.recipe, partial(_evaluate_rank, question), rendezvous=rendezvous, remedy=OTHER_LAYOUT
    )


def _evaluate_rank(question: Question, place: Place) -> Evaluation:
    with loaded(question.plan.recipe, question.checkpoint, place) as model:
        stream = read_stream(question.data, question.held_out_fraction)
        loss = told_by_one(_mean_loss(model, stream))
        if not 0 <= loss < float("inf"):
            raise MeasurementError(f"{question.checkpoint}: its loss is not finite")
        return Evaluation(
            recipe=question.plan.recipe.name,
            checkpoint=str(question.checkpoint),
            num_steps=model.num_steps,
            data=question.data,
            part="all" if question.held_out_fraction is None else "held_out",
            num_documents=stream.num_documents,
            num_tokens=stream.num_tokens - 1,
            loss=loss,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """Documents one behind the other as one text."""

    dataset: Any
    """IndexedDataset; the memory of its arrays goes with it."""
    first_byte: int
    num_documents: int
    num_tokens: int

    def sequence(self, index: int, *, length: int) -> torch.Tensor:
        """Sequence `index` and the token after its end: int64 [at most length + 1], empty behind the text."""
        start = index * length
        count = max(0, min(length + 1, self.num_tokens - start))
        if count < 2:  # no label
            return torch.zeros(0, dtype=torch.int64)
        index_file = self.dataset.index
        offset = self.first_byte + start * index_file.dtype_size
        tokens = self.dataset.bin_reader.read(dtype=index_file.dtype, count=count, offset=offset)
        return torch.from_numpy(tokens.astype("int64"))


def read_stream(prefix: str, held_out_fraction: float | None) -> Stream:
    """The documents of a dataset, or those that a run of that fraction did not train on.

    Raises BadInputError where they have nothing to predict.
    """
    dataset = IndexedDataset(prefix)
    lengths = dataset.sequence_lengths
    first = 0 if held_out_fraction is None else num_training_documents(len(lengths), held_out_fraction)
    num_tokens = int(lengths[first:].sum())
    if num_tokens < 2:
        raise BadInputError(
            f"{prefix}: nothing to evaluate in {len(lengths) - first} documents; drop --held-out"
        )
    return Stream(
        dataset=dataset,
        first_byte=int(dataset.index.sequence_pointers[first]),
        num_documents=len(lengths) - first,
        num_tokens=num_tokens,
    )


def _mean_loss(model: Loaded, stream: Stream) -> float | None:
    """Over all tokens but the first; None but on the last pipeline stage."""
    plan, total, is_known = model.plan, 0.0, True
    num_labels = stream.num_tokens - 1
    tokens_per_batch = plan.data_size * plan.num_micro_batches * plan.micro_batch_size * plan.seq_len
    for batch, start in enumerate(range(0, num_labels, tokens_per_batch)):
        loss = loss_of(model.model, list(_batches(plan, stream, batch)))
        is_known = loss is not None
        if loss is not None:
            total += float(loss) * min(tokens_per_batch, num_labels - start)
    return total / num_labels if is_known else None


def _batches(plan: BatchPlan, stream: Stream, batch: int) -> Iterator[dict[str, torch.Tensor]]:
    per_batch = plan.data_size * plan.num_micro_batches * plan.micro_batch_size

    def draw(index: int) -> torch.Tensor:
        return stream.sequence(batch * per_batch + index, length=plan.seq_len)

    yield from step_batches(plan, batch, draw=draw)
