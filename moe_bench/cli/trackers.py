"""The experiment trackers that a record is written for: options of `run` and of `results export`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from moe_bench.results.record import Record

TensorboardOption = Annotated[
    Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write TensorBoard event files below DIR.")
]
MlflowOption = Annotated[
    str | None, typer.Option("--mlflow", metavar="EXPERIMENT", help="Add a run to this experiment of MLflow.")
]
WandbOption = Annotated[
    str | None, typer.Option("--wandb", metavar="PROJECT", help="Add a run to this project of W&B.")
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Trackers:
    """Those that were asked for."""

    tensorboard: Path | None
    mlflow: str | None
    wandb: str | None

    def require(self) -> None:
        """Raise MissingRequirementError now where one of them is not installed, not when the run is over."""
        from moe_bench.report.export.mlflow import require_mlflow
        from moe_bench.report.export.tensorboard import require_tensorboard
        from moe_bench.report.export.wandb import require_wandb

        for asked, check in (
            (self.tensorboard, require_tensorboard),
            (self.mlflow, require_mlflow),
            (self.wandb, require_wandb),
        ):
            if asked is not None:
                check()

    def arguments(self) -> tuple[str, ...]:
        """The options as they were typed, for another process."""
        named = (("--tensorboard", self.tensorboard), ("--mlflow", self.mlflow), ("--wandb", self.wandb))
        return tuple(word for option, value in named if value is not None for word in (option, str(value)))

    def write(self, record: Record, path: Path) -> Iterator[str]:
        """Write `record`, which lies in `path`, for each of them; one line says where it went."""
        from moe_bench.report.export.mlflow import write_mlflow
        from moe_bench.report.export.tensorboard import write_events
        from moe_bench.report.export.wandb import write_wandb

        if self.tensorboard is not None:
            yield f"TensorBoard: {write_events(record, self.tensorboard, record_id=path.stem)}"
        if self.mlflow is not None:
            yield f"MLflow: run {write_mlflow(record, self.mlflow, record_id=path.stem)} in {self.mlflow}"
        if self.wandb is not None:
            yield f"W&B: run {write_wandb(record, self.wandb, record_id=path.stem)} in {self.wandb}"
