"""The verb that says whether two settings of a recipe learn alike: parity."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_bench.cli.app import MODEL, app
from moe_bench.cli.files import picture_to_write
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
    results_root,
)
from moe_bench.errors import MeasurementError
from moe_bench.spec.catalogue import data_root

PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", callback=picture_to_write, help="Losses, differences: .png, .svg, .pdf."
    ),
]


@app.command(rich_help_panel=MODEL)
def parity(
    recipe: RecipeArgument,
    data: Annotated[Path, typer.Option("--data", metavar="PREFIX", help="A dataset of `data build`.")],
    vary: Annotated[
        list[str],
        typer.Option("--vary", metavar="FIELD=VALUE", help="What the variant changes; all of them together."),
    ],
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Of every run.")] = 20,
    repeats: Annotated[
        int, typer.Option("--repeats", min=2, help="Runs of the base from weights a rounding off.")
    ] = 4,
    out: Annotated[Path | None, typer.Option("--out", help="Instead of results/.")] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Whether two settings of a recipe learn alike: losses step by step, against what rounding explains."""
    from moe_bench.spec.derive_parity import require_causal
    from moe_bench.spec.derive_training import Wishes, training_job

    wishes = Wishes(
        data=str(data), num_steps=steps, validate_every=steps, num_validation_batches=1, save_every=steps
    )
    base, variant = (
        training_job(
            plan_of(recipe, scale=scale, num_gpus=num_gpus, changes=[*(changes or ()), *more]),
            wishes,
            before=None,
        )
        for more in ((), vary)
    )
    for job in (base, variant):
        require_causal(job.plan.recipe)  # refused before anything is loaded
    from moe_bench.harness.start import load_parity
    from moe_bench.launch.environment import current_environment
    from moe_bench.report.parity_plot import write_parity_plot
    from moe_bench.report.parity_view import parity_json, parity_view, verdict_text
    from moe_bench.results.parity import write_parity

    harness, console = load_parity(), make_console(stderr=True)
    found = harness.compare_losses(
        harness.ParityCase(base=base, variant=variant, varied=tuple(vary), num_repeats=repeats),
        environment=current_environment(),
        command=("moe-bench", *sys.argv[1:]),
        source_root=data_root(),
        on_run=lambda name: console.print(f"training: {name}", highlight=False),
    )
    path = write_parity(out or results_root(), found)
    if plot is not None:
        write_parity_plot(found, plot)
    print_view(parity_view(found, path), parity_json(found, path), as_json)
    if not found.is_equal:
        raise MeasurementError(f"{found.base.plan.asked}: {verdict_text(found)}")
