"""A training run: its ranks, forked from here without a GPU, or the one rank that this process is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from moe_bench.harness.all_ranks import Place, on_all_ranks
from moe_bench.harness.data.build import read_manifest
from moe_bench.harness.training.program import Start, train_rank
from moe_bench.harness.workers import Message
from moe_bench.results.training_health import HealthLine
from moe_bench.results.training_log import LogLine
from moe_bench.spec.derive_training import require_checkpoints, require_vocabulary
from moe_bench.spec.rendezvous import Rendezvous
from moe_bench.spec.training import TrainingJob

__all__ = ["Start", "train"]


def train(
    job: TrainingJob,
    folder: Path,
    start: Start,
    *,
    rendezvous: Rendezvous | None,
    on_line: Callable[[LogLine], None],
    on_health: Callable[[HealthLine], None],
) -> None:
    """Train `job` in `folder`; `on_line` is called after each step where the loss is known.

    `on_health` is called before it when the experts are due.

    With a `rendezvous` this process is one rank. Without one, and without a GPU, the ranks are forked from
    this process, which must have one thread and must have run no tensor operation.

    Raises MeasurementError where a loss is not finite or a checkpoint cannot be written, BadInputError where
    data or checkpoint do not fit the model, and where the weights could not be saved,
    MissingRequirementError where something is not here.
    """
    if start.saves_checkpoints:
        require_checkpoints(job.plan.recipe)
    require_vocabulary(job.plan, read_manifest(Path(job.data)).tokenizer, job.data)

    def on_progress(line: LogLine | HealthLine) -> None:
        if isinstance(line, LogLine):
            on_line(line)
        else:
            on_health(line)

    on_all_ranks(
        job.plan.recipe,
        partial(_rank, job, folder, start),
        rendezvous=rendezvous,
        remedy="name the member of its family with --num-gpus",
        on_progress=on_progress,
    )


def _rank(job: TrainingJob, folder: Path, start: Start, place: Place) -> int | None:
    def on_line(line: LogLine) -> None:
        place.tell(Message(kind="step", content=line.step))
        place.tell(Message(kind="progress", content=line))

    def on_health(line: HealthLine) -> None:
        place.tell(Message(kind="progress", content=line))

    return train_rank(job, folder, start, place.rendezvous, on_line, on_health, listen_fd=place.listen_fd)
