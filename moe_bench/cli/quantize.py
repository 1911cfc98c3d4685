"""The verb that quantises a trained or random model and says what it costs: quantize."""

from __future__ import annotations

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
from moe_bench.spec.recipe import Arithmetic, QuantFormat

if TYPE_CHECKING:
    from moe_bench.checkpoints.rule import Rule
    from moe_bench.harness.quantize.program import Quantized
    from moe_bench.spec.quantization import QuantizeJob


FormatOption = Annotated[
    QuantFormat | None,
    typer.Option("--format", help="Of weights and inputs of linear layers; that of the recipe."),
]
ExpertsOnlyOption = Annotated[
    bool, typer.Option("--experts-only", help="Routed experts alone; the rest stays as it is.")
]
ArithmeticOption = Annotated[
    Arithmetic,
    typer.Option(
        "--arithmetic",
        help="simulated: BF16 products of rounded values; packed: of weights held in the format's bits; "
        "real: 8-bit products, fp8 on Hopper.",
    ),
]
ExportOption = Annotated[
    Path | None, typer.Option("--export", metavar="DIR", help="To make: Hugging Face's, quantised.")
]


@app.command(rich_help_panel=MODEL)
def quantize(
    recipe: RecipeArgument,
    format: FormatOption = None,
    experts_only: ExpertsOnlyOption = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", metavar="RUN", help="Of `train`, or its folder; random weights."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option("--data", metavar="PREFIX", help="Of `data build`; random tokens.")
    ] = None,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    calibration_batches: Annotated[
        int, typer.Option("--calibration-batches", min=1, help="Global batches that set the scales.")
    ] = 4,
    evaluation_batches: Annotated[
        int, typer.Option("--evaluation-batches", min=1, help="Global batches that judge.")
    ] = 4,
    arithmetic: ArithmeticOption = "simulated",
    export: ExportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Quantise a model after its training: divergence, perplexity and size against the original."""
    from moe_bench.harness.start import quiet_imports, require_package
    from moe_bench.report.progress import announce
    from moe_bench.report.quantize_view import quantize_json, quantize_view
    from moe_bench.spec.quantization import quantize_job

    plan = plan_of(recipe, scale=scale, num_gpus=num_gpus, changes=changes, rounds=True)
    job = quantize_job(
        plan,
        format=format,
        experts_only=experts_only,
        arithmetic=arithmetic,
        data=None if data is None else str(data),
        num_calibration_batches=calibration_batches,
        num_evaluation_batches=evaluation_batches,
    )
    weights = None if checkpoint is None else _checkpoint(checkpoint)
    rules = () if export is None else _exported(job, weights, export)
    place = rank_here()
    is_speaker = place is None or place.rank == 0
    if is_speaker:
        announce(job.plan, make_console(stderr=True))
    require_package("modelopt", extra="modelopt")
    with quiet_imports():
        from moe_bench.harness.quantize.program import quantize as quantized
    found = quantized(job, weights, rendezvous=place)
    if is_speaker and export is not None and weights is not None:
        _export(job, found, weights, export, rules)
    if is_speaker:
        told = {
            "weights": "random weights" if weights is None else f"weights of {weights}",
            "text": "random tokens" if data is None else f"the held-out part of {data}",
        }
        written_to = None if export is None else str(export)
        view = quantize_view(found.report, **told, written_to=written_to)
        print_view(view, quantize_json(found.report, **told, written_to=written_to), as_json)


def _exported(job: QuantizeJob, weights: Path | None, target: Path) -> tuple[Rule, ...]:
    """The map to Hugging Face's names, before anything is loaded that could turn out to be in vain."""
    from moe_bench.checkpoints.family import family_of
    from moe_bench.harness.start import quiet_imports, require_package

    if weights is None:
        raise BadInputError("--export: random weights are of no use to anyone; name a --checkpoint")
    if target.exists():
        raise BadInputError(f"{target}: is there already; name a new folder, or remove it")
    recipe = job.plan.recipe
    rules = tuple(family_of(recipe.model).rules(recipe.model, num_mtp_layers=recipe.num_mtp_layers))
    require_package("modelopt", extra="modelopt")
    require_package("safetensors", extra="huggingface")
    with quiet_imports():
        from moe_bench.harness.quantize.export import require_layout
    require_layout(job, rules)
    return rules


def _export(job: QuantizeJob, found: Quantized, weights: Path, target: Path, rules: tuple[Rule, ...]) -> None:
    from moe_bench.cli.model import DEFAULT_SHARD_BYTES
    from moe_bench.harness.quantize.export import export
    from moe_bench.report.convert_view import convert_progress

    with convert_progress(rules, make_console(stderr=True)) as on_tensor:
        export(
            job,
            found,
            weights,
            target,
            rules=rules,
            max_shard_bytes=DEFAULT_SHARD_BYTES,
            on_tensor=on_tensor,
        )


def _checkpoint(path: Path) -> Path:
    """The newest one of a run's folder, or the folder itself."""
    from moe_bench.results.training_run import JOB, newest_checkpoint

    if not (path / JOB).is_file():
        return path
    newest = newest_checkpoint(path)
    if newest is None:
        raise BadInputError(f"{path}: the run has no whole checkpoint yet; wait for one")
    return newest
