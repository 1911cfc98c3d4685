"""The verb that teaches a recipe's model real text: train."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import MODEL, app
from moe_bench.cli.options import (
    JsonOption,
    NumGpusOption,
    RecipeArgument,
    ScaleOption,
    ScaleOptionType,
    SetOption,
    make_console,
    plan_of,
    print_view,
    rank_here,
)
from moe_bench.errors import BadInputError
from moe_bench.spec.derive_training import DEFAULT_STEPS

if TYPE_CHECKING:
    from moe_bench.spec.training import TrainingJob


@app.command(rich_help_panel=MODEL)
def train(
    recipe: RecipeArgument,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run: log, checkpoints, job.json.")],
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PREFIX", help="A dataset of `data build`.")
    ] = None,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    steps: Annotated[
        int | None, typer.Option("--steps", min=1, help=f"All of the run; {DEFAULT_STEPS} if not said.")
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option("--warmup-steps", min=0, help="Of the learning rate; a hundredth.")
    ] = None,
    decay_steps: Annotated[
        int | None, typer.Option("--decay-steps", min=1, help="To its minimum, by a cosine; all steps.")
    ] = None,
    min_lr_fraction: Annotated[
        float | None, typer.Option("--min-lr-fraction", min=0, max=1, help="The minimum; 0.1.")
    ] = None,
    expert_lr_factor: Annotated[
        float | None, typer.Option("--expert-lr-factor", min=0.001, help="Of the experts' rate; 1.")
    ] = None,
    valid_fraction: Annotated[
        float | None, typer.Option("--valid-fraction", help="Of the documents, the last ones; 0.05.")
    ] = None,
    valid_every: Annotated[
        int | None, typer.Option("--valid-every", min=1, help="Steps between two validations; a tenth.")
    ] = None,
    valid_batches: Annotated[
        int | None, typer.Option("--valid-batches", min=1, help="Global batches of each; 4.")
    ] = None,
    save_every: Annotated[
        int | None, typer.Option("--save-every", min=1, help="Steps between two checkpoints; a tenth.")
    ] = None,
    keep: Annotated[int | None, typer.Option("--keep", min=1, help="Checkpoints, the newest; 2.")] = None,
    health_every: Annotated[
        int | None, typer.Option("--health-every", min=1, help="Steps added up in a line of health.jsonl.")
    ] = None,
    alarm_share: Annotated[
        float | None,
        typer.Option("--alarm-share", min=0.001, max=1, help="Of the tokens, to one expert; sqrt(k / E)."),
    ] = None,
    alarm_dead: Annotated[
        int | None, typer.Option("--alarm-dead", min=1, help="Steps of an expert without a token; 100.")
    ] = None,
    tensorboard: Annotated[
        Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write event files there, as it goes.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out, also with changes.")
    ] = False,
    start_from: Annotated[
        Path | None, typer.Option("--from", metavar="CHECKPOINT", help="Begin with these weights.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train on text: warm-up and cosine, validation, checkpoints; resume under another layout."""
    from moe_bench.report.export.tensorboard import require_tensorboard
    from moe_bench.results.training_run import find_checkpoint, read_job, require_no_run
    from moe_bench.spec.derive_training import Wishes, training_job

    if resume and start_from is not None:
        raise BadInputError("--from begins a run and --resume goes on with one: leave one of the two out")
    if tensorboard is not None:
        require_tensorboard()
    before = read_job(out) if resume else None
    if before is not None:
        start_from, _ = find_checkpoint(out)
    elif data is None:
        raise BadInputError("--data: what is there to learn? build a dataset with moe-bench data build")
    else:
        require_no_run(out)
    wishes = Wishes(
        data=None if data is None else str(data),
        num_steps=steps,
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
    all_changes = [*(before.plan.modified if before is not None else ()), *(changes or ())]
    plan = plan_of(recipe, scale=scale, num_gpus=num_gpus, changes=all_changes)
    job = training_job(plan, wishes, before=before)
    _train(job, out, start_from, goes_on=before is not None, tensorboard=tensorboard, as_json=as_json)


def _train(
    job: TrainingJob,
    folder: Path,
    checkpoint: Path | None,
    *,
    goes_on: bool,
    tensorboard: Path | None,
    as_json: bool,
) -> None:
    from moe_bench.harness.start import load_training
    from moe_bench.report.progress import announce
    from moe_bench.report.training_follow import Follower
    from moe_bench.report.training_view import training_json, training_progress, training_view
    from moe_bench.results.training_log import read_log

    console, place = make_console(stderr=True), rank_here()
    is_speaker = place is None or place.rank == 0
    if is_speaker:
        announce(job.plan, console)
    harness = load_training()
    start = harness.Start(checkpoint=checkpoint, with_optimizer=goes_on)
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
            harness.train(
                job,
                folder,
                start,
                rendezvous=place,
                on_line=follower.hear_line,
                on_health=follower.hear_health,
            )
    if is_speaker:
        lines = tuple(read_log(folder))
        print_view(training_view(job, lines, folder), training_json(job, lines, folder), as_json)
