"""The options of the verb train, one type for each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moe_bench.cli.options import ScaleOption

RunScaleOption = Annotated[
    ScaleOption | None,
    typer.Option("--scale", help="full: as asked; smoke: toy on CPU. Of a run that goes on, as before."),
]
OutOption = Annotated[Path, typer.Option("--out", help="Folder of the run: log, checkpoints, job.json.")]
DataOption = Annotated[
    Path | None, typer.Option("--data", metavar="PREFIX", help="A dataset of `data build`.")
]
StepsOption = Annotated[int | None, typer.Option("--steps", min=1, help="All of the run; 1000.")]
WarmupStepsOption = Annotated[
    int | None, typer.Option("--warmup-steps", min=0, help="Of the learning rate; a hundredth.")
]
DecayStepsOption = Annotated[
    int | None, typer.Option("--decay-steps", min=1, help="To its minimum, by a cosine; all steps.")
]
MinLrFractionOption = Annotated[
    float | None, typer.Option("--min-lr-fraction", min=0, max=1, help="The minimum; 0.1.")
]
ExpertLrFactorOption = Annotated[
    float | None, typer.Option("--expert-lr-factor", min=0.001, help="Of the experts' rate; 1.")
]
ValidFractionOption = Annotated[
    float | None, typer.Option("--valid-fraction", help="Of the documents, the last ones; 0.05.")
]
ValidEveryOption = Annotated[
    int | None, typer.Option("--valid-every", min=1, help="Steps between two validations; a tenth.")
]
ValidBatchesOption = Annotated[
    int | None, typer.Option("--valid-batches", min=1, help="Global batches of each; 4.")
]
SaveEveryOption = Annotated[
    int | None, typer.Option("--save-every", min=1, help="Steps between two checkpoints; a tenth.")
]
KeepOption = Annotated[int | None, typer.Option("--keep", min=1, help="Checkpoints, the newest; 2.")]
HealthEveryOption = Annotated[
    int | None,
    typer.Option("--health-every", min=1, help="Steps added up in a line of health.jsonl; a hundredth."),
]
AlarmShareOption = Annotated[
    float | None,
    typer.Option("--alarm-share", min=0.001, max=1, help="Of the tokens, to one expert; sqrt(k / E)."),
]
AlarmDeadOption = Annotated[
    int | None,
    typer.Option("--alarm-dead", min=1, help="Steps of an expert without a token; a tenth, 100 at most."),
]
TensorboardOption = Annotated[
    Path | None, typer.Option("--tensorboard", metavar="DIR", help="Write event files there, as it goes.")
]
ResumeOption = Annotated[
    bool, typer.Option("--resume", help="Go on from the newest checkpoint in --out, also with changes.")
]
LoraRankOption = Annotated[
    int | None, typer.Option("--lora-rank", min=1, help="Train adapters of attention alone, with --from.")
]
StartFromOption = Annotated[
    Path | None, typer.Option("--from", metavar="CHECKPOINT", help="Begin with these weights.")
]
