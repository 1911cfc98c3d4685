"""What a recipe becomes when it is to learn: the same, with a router that is free to choose."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from pydantic import ValidationError

from moe_bench.errors import BadInputError
from moe_bench.spec.dataset import TokenizerSpec
from moe_bench.spec.recipe import Recipe, Routing
from moe_bench.spec.scale import Plan, Substitution
from moe_bench.spec.training import Asked, Checkpoints, Health, LearningRate, TrainingJob, Validation

DEFAULT_STEPS = 1000
TOY_BATCH_SIZE = 8
"""Sequences of a global batch at smoke scale: a micro batch for each of at most eight ranks."""


def training_plan(plan: Plan) -> Plan:
    """`plan` with natural routing and, of a toy, a global batch that is the same in every layout.

    Both are listed among the substitutions; how many steps a benchmark takes is not asked here.
    """
    recipe = plan.recipe
    rows = {row.field: row for row in plan.substitutions if not row.field.startswith(("steps.", "routing"))}
    if recipe.routing.mode != "natural":
        why = "a router whose choice is forced learns nothing"
        rows["routing"] = Substitution(field="routing", asked=recipe.routing.mode, used="natural", why=why)
        recipe = recipe.model_copy(update={"routing": Routing(mode="natural")})
    if plan.scale == "smoke":
        asked = rows["global_batch_size"].asked if "global_batch_size" in rows else str(TOY_BATCH_SIZE)
        rows["global_batch_size"] = Substitution(
            field="global_batch_size", asked=asked, used=str(TOY_BATCH_SIZE), why="the same in every layout"
        )
        recipe = recipe.model_copy(update={"global_batch_size": TOY_BATCH_SIZE})
    return plan.model_copy(update={"recipe": recipe, "substitutions": tuple(rows.values())})


def require_vocabulary(plan: Plan, tokenizer: TokenizerSpec, data: str) -> None:
    """Raise BadInputError where the dataset has tokens that the model does not."""
    size = plan.recipe.model.vocab_size
    if tokenizer.vocab_size > size:
        raise BadInputError(
            f"{data}: its tokenizer has {tokenizer.vocab_size} tokens and {plan.recipe.model.key} knows "
            f"{size}; build the dataset with the model's own tokenizer"
        )


def require_checkpoints(recipe: Recipe) -> None:
    """Raise BadInputError where what Megatron-FSDP divides could not be saved (training/fsdp_state.py).

    With several instances a rank holds the same rows as others, and nobody says which of them are saved.
    """
    parallel = recipe.parallel
    if parallel.data_sharding == "megatron_fsdp" and parallel.num_optimizer_instances > 1:
        raise BadInputError(
            f"{recipe.name}: parallel.num_optimizer_instances: train cannot save what megatron_fsdp divides "
            "over several (docs/train.md); add --set parallel.num_optimizer_instances=1"
        )


def require_same_tokenizer(job: TrainingJob, tokenizer: TokenizerSpec, said: str) -> None:
    """Raise BadInputError where `said`, a dataset or an option, has other tokens than the run has learned."""
    if job.tokenizer is not None and not job.tokenizer.is_same_as(tokenizer):
        raise BadInputError(
            f"{said}: a tokenizer of {tokenizer.vocab_size} tokens ({tokenizer.path or tokenizer.kind}); the "
            f"run has learned those of another, of {job.tokenizer.vocab_size} "
            f"({job.tokenizer.path or job.tokenizer.kind}); use that"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Wishes:
    """What a user says of a training run; None is left to what was said before, or to a default."""

    data: str | None = None
    num_steps: int | None = None
    lora_rank: int | None = None
    num_warmup_steps: int | None = None
    num_decay_steps: int | None = None
    minimum_fraction: float | None = None
    expert_factor: float | None = None
    validation_fraction: float | None = None
    validate_every: int | None = None
    num_validation_batches: int | None = None
    save_every: int | None = None
    num_kept: int | None = None
    health_every: int | None = None
    alarm_share_fraction: float | None = None
    alarm_dead_steps: int | None = None


def training_job(
    plan: Plan, wishes: Wishes, *, before: TrainingJob | None, asked: Asked | None = None
) -> TrainingJob:
    """The run of `plan` that `wishes` ask for, going on from `before` where there is such.

    `asked` is what the plan was made of; None is the recipe of its name with its changes.

    Raises BadInputError for values that contradict one another, and where a run that goes on would be one of
    another recipe.
    """
    if asked is None:
        asked = Asked(recipe=plan.asked, scale=plan.scale, changes=plan.modified)
    if before is not None and before.asked.recipe != asked.recipe:
        raise BadInputError(
            f"{asked.recipe}: the run in the folder is one of {before.asked.recipe}; name that"
        )
    earlier = Wishes() if before is None else _wishes_of(before)
    num_steps = wishes.num_steps or earlier.num_steps or DEFAULT_STEPS
    sources = (wishes, earlier, _defaults(num_steps))
    said: dict[str, Any] = {
        field.name: next(
            (value for source in sources if (value := getattr(source, field.name)) is not None), None
        )
        for field in fields(Wishes)
    }
    if said["lora_rank"] is not None:
        _require_plain_weights(plan.recipe)
    try:
        return TrainingJob(
            asked=asked,
            plan=training_plan(plan),
            data=said["data"],
            tokenizer=None if before is None else before.tokenizer,
            validation_fraction=said["validation_fraction"],
            num_steps=num_steps,
            lora_rank=said["lora_rank"],
            learning_rate=LearningRate(
                num_warmup_steps=said["num_warmup_steps"],
                num_decay_steps=said["num_decay_steps"],
                minimum_fraction=said["minimum_fraction"],
                expert_factor=said["expert_factor"],
            ),
            validation=Validation(
                every_steps=said["validate_every"], num_batches=said["num_validation_batches"]
            ),
            checkpoints=Checkpoints(every_steps=said["save_every"], num_kept=said["num_kept"]),
            health=Health(
                every_steps=said["health_every"],
                alarm_share_fraction=said["alarm_share_fraction"],
                alarm_dead_steps=said["alarm_dead_steps"],
            ),
        )
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]["msg"].removeprefix("Value error, ")
        raise BadInputError(f"train: {problem}; change one of them") from error


def _require_plain_weights(recipe: Recipe) -> None:
    """Raise BadInputError where adapters would stand beside weights with which they were not tried."""
    if recipe.quantization is not None:
        raise BadInputError(
            "--lora-rank: the recipe learns with quantised weights, beside which adapters were not tried; "
            "add --set quantization=null, or drop it"
        )
    if recipe.parallel.data_sharding == "megatron_fsdp":
        raise BadInputError(
            "--lora-rank: the recipe divides weights by Megatron-FSDP, with which adapters were not tried; "
            "add --set parallel.data_sharding=distributed_optimizer, or drop it"
        )


def _wishes_of(job: TrainingJob) -> Wishes:
    return Wishes(
        data=job.data,
        num_steps=job.num_steps,
        lora_rank=job.lora_rank,
        num_warmup_steps=job.learning_rate.num_warmup_steps,
        num_decay_steps=job.learning_rate.num_decay_steps,
        minimum_fraction=job.learning_rate.minimum_fraction,
        expert_factor=job.learning_rate.expert_factor,
        validation_fraction=job.validation_fraction,
        validate_every=job.validation.every_steps,
        num_validation_batches=job.validation.num_batches,
        save_every=job.checkpoints.every_steps,
        num_kept=job.checkpoints.num_kept,
        health_every=job.health.every_steps,
        alarm_share_fraction=job.health.alarm_share_fraction,
        alarm_dead_steps=job.health.alarm_dead_steps,
    )


def _defaults(num_steps: int) -> Wishes:
    tenth = max(1, num_steps // 10)
    return Wishes(
        data="",
        num_steps=num_steps,
        num_warmup_steps=min(num_steps - 1, max(1, num_steps // 100)),
        num_decay_steps=num_steps,
        minimum_fraction=0.1,
        expert_factor=1.0,
        validation_fraction=0.05,
        validate_every=tenth,
        num_validation_batches=4,
        save_every=tenth,
        num_kept=2,
        health_every=max(1, num_steps // 100),
        alarm_dead_steps=min(100, tenth),
    )
