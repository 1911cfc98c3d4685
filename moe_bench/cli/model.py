"""Verbs about models themselves: verify."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from moe_bench.cli.app import MODEL, app
from moe_bench.cli.options import (
    JsonOption,
    RecipeArgument,
    ScaleOption,
    SetOption,
    make_console,
    make_loader,
    plan_of,
    print_view,
    results_root,
)
from moe_bench.errors import MeasurementError
from moe_bench.spec.catalogue import data_root


@app.command(rich_help_panel=MODEL)
def verify(
    recipe: RecipeArgument,
    changes: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Instead of results/.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that a recipe's model is Hugging Face's: logits and gradients of one step on the same weights."""
    from moe_bench.checkpoints.family import family_of

    asked = plan_of(recipe, scale=ScaleOption.FULL, num_gpus=None, changes=changes).recipe
    family_of(asked.model)  # a model without a map is refused before anything is loaded
    from moe_bench.harness.start import load_verify
    from moe_bench.launch.environment import current_environment
    from moe_bench.report.verify_view import verification_json, verification_view
    from moe_bench.results.verification import write_verification

    console = make_console(stderr=True)
    found = load_verify().verify(
        asked,
        host=make_loader().system("cpu_host"),
        environment=current_environment(),
        command=("moe-bench", *sys.argv[1:]),
        source_root=data_root(),
        on_layout=lambda layout: console.print(f"{asked.model.key}: {layout}", highlight=False),
    )
    path = write_verification(out or results_root(), found)
    print_view(verification_view(found, path), verification_json(found, path), as_json)
    for proof in found.proofs:
        if not proof.is_equal:
            worst = ", ".join(f"{error.tensor} {error.error_fraction:.1e}" for error in proof.suspects[:6])
            raise MeasurementError(
                f"{asked.model.key}: not Hugging Face's {asked.model.hf_model_type} under {proof.layout}: "
                f"first differs in {proof.first_difference or 'the logits'}; look at the rules of {worst}"
            )
