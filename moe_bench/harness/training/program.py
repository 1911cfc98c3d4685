"""What one rank of a training run does: build, restore, train, validate, save."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

from moe_bench.harness import sanity
from moe_bench.harness.adapters import adapters_of
from moe_bench.harness.batches import BatchPlan
from moe_bench.harness.build import Training, set_seeds
from moe_bench.harness.data.build import read_manifest
from moe_bench.harness.data.tokenizer import tokenizer_of
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.rank import batch_plan, build, joined
from moe_bench.harness.settings import settings_of
from moe_bench.harness.step import loss_of, train_step
from moe_bench.harness.trainer import speaks_for_job
from moe_bench.harness.training.beginning import begun
from moe_bench.harness.training.checkpoint import CheckpointWriter, Progress
from moe_bench.harness.training.data import Text, read_text
from moe_bench.harness.training.health import HealthCounter
from moe_bench.harness.training.learning_rate import learning_rate_now, scheduler
from moe_bench.results.training_health import HealthLine
from moe_bench.results.training_log import LogLine
from moe_bench.results.training_run import CACHE, CHECKPOINTS
from moe_bench.spec.rendezvous import Rendezvous
from moe_bench.spec.training import Nudge, TrainingJob


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """Where a run begins."""

    checkpoint: Path | None
    """None begins with fresh weights."""
    with_optimizer: bool = True
    """Whether the optimizer's state and the count of steps are taken up too, or the weights alone."""
    weights_by_name: bool = False
    """Whether fresh weights are the same in every layout on GPUs too; without one they always are."""
    nudge: Nudge | None = None
    """Of such weights; None for none."""
    saves_checkpoints: bool = True
    """Whether the run leaves weights, or its losses alone."""


def train_rank(
    job: TrainingJob,
    folder: Path,
    start: Start,
    rendezvous: Rendezvous,
    on_line: Callable[[LogLine], None],
    on_health: Callable[[HealthLine], None],
    *,
    listen_fd: int | None = None,
) -> int | None:
    """Train as one rank of `job` in `folder`; the number of steps on the rank that speaks for the job.

    There `on_line` is called after each step, and `on_health` before it where experts are due. Raises
    MeasurementError where a loss is not finite or a checkpoint cannot be written, BadInputError where data or
    checkpoint do not fit the model.
    """
    arguments = megatron_arguments(job.plan.recipe)
    settings = settings_of(arguments)
    adapt = None if job.lora_rank is None else adapters_of(job.lora_rank)
    with joined(arguments, settings, rendezvous, listen_fd=listen_fd) as (device, _):
        built = build(
            arguments,
            settings,
            device=device,
            rates=job.learning_rate,
            weights_by_name=start.weights_by_name,
            nudge=start.nudge,
            adapt=adapt,
        )
        tokenizer = tokenizer_of(read_manifest(Path(job.data)).tokenizer)
        text = read_text(job, tokenizer, cache=folder / CACHE)
        plan = batch_plan(settings, vocab_size=cast(int, arguments.model["vocab_size"]), device=device)
        progress = begun(
            built,
            settings,
            start.checkpoint,
            with_optimizer=start.with_optimizer,
            first_batches=partial(text.train_batches, plan),
        )
        run = _Run(
            job=job,
            built=built,
            text=text,
            plan=plan,
            rank=rendezvous.rank,
            on_line=on_line,
            on_health=on_health,
        )
        writer = CheckpointWriter(folder / CHECKPOINTS, num_kept=job.checkpoints.num_kept)
        run.steps(progress, writer if start.saves_checkpoints else None)
        return job.num_steps if speaks_for_job() else None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """The steps of one rank."""

    job: TrainingJob
    built: Training
    text: Text
    plan: BatchPlan
    rank: int
    on_line: Callable[[LogLine], None]
    on_health: Callable[[HealthLine], None]

    def steps(self, progress: Progress, writer: CheckpointWriter | None) -> None:
        """Train from `progress` to the end, saving on the way and at the end where there is a `writer`."""
        job, rates = self.job, scheduler(self.built.optimizer, self.job.learning_rate)
        rates.step(progress.num_steps)
        experts = HealthCounter(job, self.built, device=self.plan.device, num_steps=progress.num_steps)
        for step in range(progress.num_steps, job.num_steps):
            rates.step(1)
            # what draws numbers, as moe_input_jitter_eps does, draws the same ones in a run that was resumed
            set_seeds(job.plan.recipe.seed, step=step)
            outcome = train_step(self.built, self.text.train_batches(self.plan, step))
            loss = None if outcome.loss is None else float(outcome.loss)
            sanity.require_finite(
                rank=self.rank,
                step=step + 1,
                loss=loss,
                grad_norm=outcome.grad_norm or 0.0,
                was_applied=outcome.was_applied,
            )
            num_done = step + 1
            is_last = num_done == job.num_steps
            is_due = num_done % job.validation.every_steps == 0
            validation_loss = self.validation_loss() if is_due or is_last else None
            health = experts.line(num_done) if num_done % job.health.every_steps == 0 or is_last else None
            if health is not None and health.layers and speaks_for_job():
                self.on_health(health)
            if loss is not None and speaks_for_job():
                self.on_line(
                    LogLine(
                        step=num_done,
                        loss=loss,
                        grad_norm=outcome.grad_norm,
                        learning_rate=learning_rate_now(self.built.optimizer),
                        validation_loss=validation_loss,
                    )
                )
            if writer is None:
                continue
            writer.poll()
            if num_done % job.checkpoints.every_steps == 0 or is_last:
                writer.save(self.built, Progress(num_steps=num_done))
        if writer is not None:
            writer.close()

    def validation_loss(self) -> float | None:
        """Mean over the validation batches; None but on the last pipeline stage."""
        losses = [
            loss_of(self.built, self.text.valid_batches(self.plan, batch))
            for batch in range(self.job.validation.num_batches)
        ]
        known = [float(loss) for loss in losses if loss is not None]
        return sum(known) / len(known) if known else None
