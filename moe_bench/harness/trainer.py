"""Steps on one rank: each is prepared, timed, checked and told to whoever watches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core import parallel_state

from moe_bench.harness import sanity
from moe_bench.harness.batches import BatchPlan, MicroBatch, step_batches
from moe_bench.harness.build import Training
from moe_bench.harness.loop import timed_steps
from moe_bench.harness.routing import LoadCounter
from moe_bench.harness.step import StepOutcome, train_step
from moe_bench.harness.step_graphs import StepGraphs


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """Progress for whoever watches, from the one rank that knows the loss."""

    step: int
    """Counted from 1, warm-up included."""
    num_steps: int
    loss: float | None
    """None from a rank that runs alone and has no loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """What a rank is given to measure with and to report to."""

    now_s: Callable[[], float]
    on_step: Callable[[int], None]
    """Called on every rank as a step begins, with its number from 1."""
    on_report: Callable[[StepReport], None]
    """Called after each step on the rank that speaks for the job."""
    on_schedule: Callable[[], None] = lambda: None
    """Called on every rank as the schedule of a step begins, and as it ends."""


class Trainer:
    """Runs steps and keeps what they leave behind."""

    def __init__(
        self,
        built: Training,
        plan: BatchPlan,
        counter: LoadCounter,
        *,
        rank: int,
        num_steps: int,
        watch: Watch,
        graphs: StepGraphs | None = None,
        is_alone: bool = False,
    ) -> None:
        self._built, self._plan, self._counter = built, plan, counter
        self._rank, self._num_steps, self._watch = rank, num_steps, watch
        self._graphs, self._is_alone = graphs or StepGraphs(), is_alone
        self.losses: list[float] = []
        """Of the steps so far; empty but on the last pipeline stage."""
        self.grad_norms: list[float] = []

    def unwatched(self) -> Trainer:
        """One that runs more steps and tells nobody of them."""
        watch = Watch(now_s=self._watch.now_s, on_step=lambda step: None, on_report=lambda report: None)
        return Trainer(
            self._built,
            self._plan,
            self._counter,
            rank=self._rank,
            num_steps=self._num_steps,
            watch=watch,
            graphs=self._graphs,
        )

    def run(self, steps: range) -> tuple[float, ...]:
        """Wall times of `steps` in seconds."""
        return timed_steps(
            steps,
            prepare=self._prepare,
            run=partial(
                train_step,
                self._built,
                on_schedule=self._watch.on_schedule,
                schedule=self._graphs.schedule,
            ),
            finish=self._finish,
            now_s=self._watch.now_s,
            synchronize=torch.cuda.synchronize,
        )

    def _prepare(self, step: int) -> list[MicroBatch]:
        self._watch.on_step(step + 1)
        self._counter.start_step(step)
        if self._graphs.capture_before(step):
            self._counter.forget_step()
        return step_batches(self._plan, step)

    def _finish(self, step: int, outcome: StepOutcome) -> None:
        loss = None if outcome.loss is None else float(outcome.loss)
        grad_norm = outcome.grad_norm
        if grad_norm is None:
            # Outside the timed interval: the gradients stay until the next step zeroes them.
            grad_norm = float(self._built.optimizer.get_grad_norm())
        sanity.require_finite(
            rank=self._rank,
            step=step + 1,
            loss=loss,
            grad_norm=grad_norm,
            was_applied=outcome.was_applied,
        )
        self.grad_norms.append(grad_norm)
        if loss is not None:
            self.losses.append(loss)
        if self._is_alone or (loss is not None and speaks_for_job()):
            self._watch.on_report(StepReport(step=step + 1, num_steps=self._num_steps, loss=loss))


def speaks_for_stage() -> bool:
    """Whether this is the first rank of its pipeline stage."""
    return bool(
        parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
        and parallel_state.get_tensor_model_parallel_rank() == 0
    )


def speaks_for_job() -> bool:
    """Whether this is the first rank of the last pipeline stage, which knows the loss."""
    return speaks_for_stage() and bool(parallel_state.is_pipeline_last_stage(ignore_virtual=True))
