"""A training run on disk: what was asked, what each step said, and where its checkpoints are."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from moe_bench.errors import BadInputError
from moe_bench.results.training_health import HealthLine, cut_health, read_health
from moe_bench.results.training_log import LogLine, cut_log, read_log
from moe_bench.spec.training import TrainingJob

JOB = "job.json"
CHECKPOINTS = "checkpoints"
CACHE = "cache"
"""Megatron-Core's indices of the dataset."""
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingRun:
    """A run as far as it has got."""

    folder: Path
    job: TrainingJob
    log: tuple[LogLine, ...]
    """A line per step."""
    health: tuple[HealthLine, ...]
    """A line per window of steps; none of a model without experts."""


def is_run(folder: Path) -> bool:
    """Whether a training run is in `folder`."""
    return (folder / JOB).is_file()


def read_run(folder: Path) -> TrainingRun:
    """The run in `folder`, also while it goes on; BadInputError names what cannot be read."""
    return TrainingRun(
        folder=folder,
        job=read_job(folder),
        log=tuple(read_log(folder)),
        health=tuple(read_health(folder)),
    )


def saved_steps(folder: Path) -> tuple[int, ...]:
    """Steps of the whole checkpoints in `folder`, oldest first."""
    found = (_STEP.fullmatch(path.name) for path in folder.glob("step-*"))
    return tuple(sorted(int(match[1]) for match in found if match is not None))


def checkpoint_path(folder: Path, step: int) -> Path:
    """`<folder>/step-<n>`, seven digits at least."""
    return folder / f"step-{step:07d}"


def require_no_run(folder: Path) -> None:
    """Raise BadInputError where there is a run in `folder`."""
    if (folder / JOB).exists():
        raise BadInputError(f"{folder}: a run is in it; go on with --resume, or name another folder")


def begin_run(folder: Path, job: TrainingJob) -> None:
    """Make the folder of a new run. Raises BadInputError where there is a run in it."""
    require_no_run(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_job(folder, job)


def write_job(folder: Path, job: TrainingJob) -> None:
    """Write what the run in `folder` is, in one step."""
    unfinished = folder / f".{JOB}"
    unfinished.write_text(job.model_dump_json(indent=1) + "\n", encoding="utf-8")
    unfinished.replace(folder / JOB)


def read_job(folder: Path) -> TrainingJob:
    """What the run in `folder` is; BadInputError where there is none."""
    path = folder / JOB
    if not path.is_file():
        raise BadInputError(f"{folder}: no run in it; name the folder of one, or leave --resume off")
    try:
        return TrainingJob.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise BadInputError(f"{path}: not a training run of this release; start a new one") from error


def find_checkpoint(path: Path) -> tuple[Path, TrainingJob | None]:
    """The checkpoint that `path` is, or the newest one of the run that it is, and that run.

    A checkpoint that lies in no run, as a converted one, has none. Raises BadInputError where there is none.
    """
    if is_run(path):
        newest = newest_checkpoint(path)
        if newest is None:
            raise BadInputError(f"{path}: its run has saved no checkpoint yet; remove it and start anew")
        return newest, read_job(path)
    if not path.is_dir():
        raise BadInputError(f"{path}: no such folder; name a checkpoint, or the run that saved it")
    run = path.resolve().parent.parent
    is_of_run = path.resolve().parent.name == CHECKPOINTS and is_run(run)
    return path, read_job(run) if is_of_run else None


def newest_checkpoint(folder: Path) -> Path | None:
    """Of the run in `folder`; None before its first one is whole."""
    steps = saved_steps(folder / CHECKPOINTS)
    return checkpoint_path(folder / CHECKPOINTS, steps[-1]) if steps else None


def has_ended(folder: Path, job: TrainingJob) -> bool:
    """Whether the run in `folder` has taken the steps of `job`; BadInputError where it has taken more."""
    num_taken = max(saved_steps(folder / CHECKPOINTS), default=0)
    if num_taken > job.num_steps:
        raise BadInputError(f"--steps {job.num_steps}: {folder} has taken {num_taken}; name as many or more")
    return num_taken == job.num_steps


def go_on(folder: Path, job: TrainingJob, *, num_steps: int) -> None:
    """Make the run in `folder` one of `job` from the checkpoint of step `num_steps` on.

    What the logs say of later steps is dropped: they are taken again.
    """
    cut_log(folder, num_steps=num_steps)
    cut_health(folder, num_steps=num_steps)
    write_job(folder, job)
