"""The verb that teaches a recipe's model real text: train."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from moe_bench.cli.app import MODEL, app
from moe_bench.cli.options import (
    JsonOption,
    NumGpusOption,
    RecipeArgument,
    ScaleOption,
    SetOption,
    make_console,
    make_loader,
    plan_of,
    print_view,
    rank_here,
)
from moe_bench.cli.train_options import (
    AlarmDeadOption,
    AlarmShareOption,
    DataOption,
    DecayStepsOption,
    ExpertLrFactorOption,
    HealthEveryOption,
    KeepOption,
    LoraRankOption,
    MinLrFractionOption,
    OutOption,
    ResumeOption,
    RunScaleOption,
    SaveEveryOption,
    StartFromOption,
    StepsOption,
    TensorboardOption,
    ValidBatchesOption,
    ValidEveryOption,
    ValidFractionOption,
    WarmupStepsOption,
)
from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import find_recipe, recipe_name

if TYPE_CHECKING:
    from moe_bench.spec.rendezvous import Rendezvous
    from moe_bench.spec.scale import Plan
    from moe_bench.spec.training import Asked, TrainingJob


@app.command(rich_help_panel=MODEL)
def train(
    recipe: RecipeArgument,
    out: OutOption,
    data: DataOption = None,
    scale: RunScaleOption = None,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    steps: StepsOption = None,
    warmup_steps: WarmupStepsOption = None,
    decay_steps: DecayStepsOption = None,
    min_lr_fraction: MinLrFractionOption = None,
    expert_lr_factor: ExpertLrFactorOption = None,
    valid_fraction: ValidFractionOption = None,
    valid_every: ValidEveryOption = None,
    valid_batches: ValidBatchesOption = None,
    save_every: SaveEveryOption = None,
    keep: KeepOption = None,
    health_every: HealthEveryOption = None,
    alarm_share: AlarmShareOption = None,
    alarm_dead: AlarmDeadOption = None,
    tensorboard: TensorboardOption = None,
    resume: ResumeOption = False,
    start_from: StartFromOption = None,
    lora_rank: LoraRankOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train on text: warm-up and cosine, validation, checkpoints; resume under another layout."""
    from moe_bench.report.export.tensorboard import require_tensorboard
    from moe_bench.results.training_run import has_ended
    from moe_bench.spec.derive_training import Wishes, require_checkpoints, training_job

    if tensorboard is not None:
        require_tensorboard()
    before, checkpoint = _begun(out, data, start_from, lora_rank, resume=resume)
    wishes = Wishes(
        data=None if data is None else str(data),
        num_steps=steps,
        lora_rank=lora_rank,
        num_warmup_steps=warmup_steps,
        num_decay_steps=decay_steps,
        minimum_fraction=min_lr_fraction,
        expert_factor=expert_lr_factor,
        validation_fraction=valid_fraction,
        validate_every=valid_every,
        num_validation_batches=valid_batches,
        save_every=save_every,
        num_kept=keep,
        health_every=health_every,
        alarm_share_fraction=alarm_share,
        alarm_dead_steps=alarm_dead,
    )
    asked = _asked(recipe, scale=scale, num_gpus=num_gpus, changes=changes, before=before)
    job = training_job(_plan(asked), wishes, before=before, asked=asked)
    require_checkpoints(job.plan.recipe)  # refused before anything is loaded
    place = rank_here()
    if before is None or not has_ended(out, job):
        _train(job, out, checkpoint, place, goes_on=before is not None, tensorboard=tensorboard)
    if place is None or place.rank == 0:
        _show(job, out, as_json)


def _plan(asked: Asked) -> Plan:
    return plan_of(
        asked.recipe,
        scale=ScaleOption(asked.scale),
        num_gpus=asked.num_gpus,
        changes=list(asked.changes),
        rounds=True,
    )


def _show(job: TrainingJob, folder: Path, as_json: bool) -> None:
    from moe_bench.report.training_view import training_json, training_view
    from moe_bench.results.training_log import read_log

    lines = tuple(read_log(folder))
    print_view(training_view(lines, folder), training_json(job, lines, folder), as_json)


def _asked(
    recipe: str,
    *,
    scale: ScaleOption | None,
    num_gpus: int | None,
    changes: list[str] | None,
    before: TrainingJob | None,
) -> Asked:
    """What is asked for now, and of the rest what was asked for before."""
    from moe_bench.spec.training import Asked

    loader = make_loader()
    name = recipe_name(find_recipe(recipe, loader), loader)
    earlier = Asked(recipe=name, scale="full") if before is None else before.asked
    return Asked(
        recipe=name,
        scale=earlier.scale if scale is None else scale.value,
        num_gpus=num_gpus or earlier.num_gpus,
        changes=(*earlier.changes, *(changes or ())),
    )


def _begun(
    out: Path, data: Path | None, start_from: Path | None, lora_rank: int | None, *, resume: bool
) -> tuple[TrainingJob | None, Path | None]:
    """The job to go on with, None for a new one, and the checkpoint that it begins with."""
    from moe_bench.results.training_run import find_checkpoint, read_job, require_no_run

    if resume and start_from is not None:
        raise BadInputError("--from begins a run and --resume goes on with one: leave one of the two out")
    if resume:
        return read_job(out), find_checkpoint(out)[0]
    if data is None:
        raise BadInputError("--data: what is there to learn? build a dataset with moe-bench data build")
    if lora_rank is not None and start_from is None:
        raise BadInputError("--lora-rank: beside which weights? name a checkpoint with --from")
    require_no_run(out)
    return None, None if start_from is None else find_checkpoint(start_from)[0]


def _train(
    job: TrainingJob,
    folder: Path,
    checkpoint: Path | None,
    place: Rendezvous | None,
    *,
    goes_on: bool,
    tensorboard: Path | None,
) -> None:
    from moe_bench.harness.start import quiet_imports
    from moe_bench.report.progress import announce
    from moe_bench.report.training_follow import Follower
    from moe_bench.report.training_view import training_progress
    from moe_bench.spec.derive_training import require_same_tokenizer

    console = make_console(stderr=True)
    with quiet_imports():
        from moe_bench.harness.data.build import read_manifest
        from moe_bench.harness.training import session
    tokenizer = read_manifest(Path(job.data)).tokenizer
    require_same_tokenizer(job, tokenizer, job.data)
    # what stops the run here is one line, not the last of fifty
    if place is None or place.rank == 0:
        announce(job.plan, console)
    job = job.model_copy(update={"tokenizer": tokenizer})
    start = session.Start(checkpoint=checkpoint, with_optimizer=goes_on)
    with training_progress(job, console, is_alone=place is None) as on_line:
        follower = Follower(
            job=job,
            folder=folder,
            goes_on=goes_on,
            tensorboard=tensorboard,
            console=console,
            on_line=on_line,
        )
        with closing(follower):
            session.train(
                job,
                folder,
                start,
                rendezvous=place,
                on_line=follower.hear_line,
                on_health=follower.hear_health,
            )
