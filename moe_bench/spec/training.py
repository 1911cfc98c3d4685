"""A training run: a recipe, the data it learns from, and what a benchmark of a few steps does not need."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from moe_bench.spec.base import Fraction, NonNegativeInt, PositiveFloat, PositiveInt, Spec, Text
from moe_bench.spec.dataset import TokenizerSpec
from moe_bench.spec.scale import Plan, Scale


class LearningRate(Spec):
    """Linear warm-up to the optimizer's learning rate, then half a cosine down to a fraction of it."""

    num_warmup_steps: NonNegativeInt = 0
    num_decay_steps: PositiveInt
    """Steps, those of the warm-up included, after which the rate stays at its minimum."""
    minimum_fraction: Fraction = 0.1
    expert_factor: PositiveFloat = 1.0
    """The experts' rate over that of all other weights."""

    @model_validator(mode="after")
    def _require_decay(self) -> Self:
        if self.num_warmup_steps >= self.num_decay_steps:
            raise ValueError(
                f"{self.num_warmup_steps} warm-up steps leave nothing of {self.num_decay_steps} to decay in"
            )
        return self


class Validation(Spec):
    """How often, and on how much, the loss of held-out text is taken."""

    every_steps: PositiveInt
    num_batches: PositiveInt
    """Global batches; each time the same ones."""


class Checkpoints(Spec):
    """What is kept of the model and the optimizer."""

    every_steps: PositiveInt
    num_kept: PositiveInt
    """The newest; older ones are removed once a newer one is whole."""


class Health(Spec):
    """How often the experts are looked at, and what is alarming about them."""

    every_steps: PositiveInt
    """Tokens are counted in every step and added up over so many."""
    alarm_share_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Of a layer's tokens, for one expert; None for sqrt(k / E) (analysis/expert_health.py)."""
    alarm_dead_steps: PositiveInt
    """Steps on end without a token."""


class Asked(Spec):
    """What a user named, so that the same model can be made again."""

    recipe: Text
    """`<model>/<run>`, or the path of a YAML file."""
    scale: Scale
    num_gpus: PositiveInt | None = None
    """`--num-gpus`."""
    changes: tuple[Text, ...] = ()
    """`key=value`, in the order in which they were said."""


class Nudge(Spec):
    """A rounding of every first weight, up or down: what a run would be if it added in another order."""

    roundoff_fraction: PositiveFloat
    seed: NonNegativeInt
    """Of the directions."""


class TrainingJob(Spec):
    """Everything that decides what a training run computes."""

    asked: Asked
    plan: Plan
    """What became of it."""
    data: Text
    """Prefix of the dataset."""
    tokenizer: TokenizerSpec | None = None
    """That of the dataset; None before it was read."""
    validation_fraction: Fraction
    """Of the documents, the last ones, which are not trained on."""
    num_steps: PositiveInt
    lora_rank: PositiveInt | None = None
    """Of the adapters that alone learn; None where all weights do."""
    learning_rate: LearningRate
    validation: Validation
    checkpoints: Checkpoints
    health: Health


class ComparedRun(Spec):
    """A training run that leaves no weights: its losses are held against those of another."""

    job: TrainingJob
    nudge: Nudge | None = None
    """Of the weights that it begins with; None for none."""
