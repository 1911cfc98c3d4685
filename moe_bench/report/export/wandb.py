"""A record as a run of Weights & Biases, online or offline as its client is set up."""

from __future__ import annotations

from itertools import groupby

from moe_bench.errors import MissingRequirementError
from moe_bench.report.export.points import points
from moe_bench.report.export.tracker import outcome, require_installed, settings
from moe_bench.results.record import Record


def require_wandb() -> None:
    """Raise MissingRequirementError without the package `wandb`."""
    require_installed("wandb", package="'moe_bench[wandb]'", name="Weights & Biases")


def write_wandb(record: Record, project: str, *, record_id: str) -> str:
    """Add `record` to `project` and return the new run's id.

    Steps carry the time at which they ran, in `time_s`; the client stamps them with the time of the export.
    Raises MissingRequirementError with the client's own words where it cannot start a run.
    """
    require_wandb()
    import wandb

    quiet = wandb.Settings(
        silent=True, console="off", x_disable_stats=True, disable_git=True, save_code=False
    )
    try:
        run = wandb.init(project=project, name=record_id, config=settings(record), settings=quiet)
    except wandb.Error as error:
        raise MissingRequirementError(f"Weights & Biases: {str(error).splitlines()[0]}") from error
    for step, at_step in groupby(sorted(points(record), key=lambda one: one.step), key=lambda one: one.step):
        values = list(at_step)
        run.log({one.tag: one.value for one in values} | {"time_s": values[0].time_s}, step=step)
    run.summary.update({f"outcome/{name}": value for name, value in outcome(record).items()})
    run.finish()
    return str(run.id)
