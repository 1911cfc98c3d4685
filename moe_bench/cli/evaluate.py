"""Verbs that ask a checkpoint: evaluate, generate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import MODEL, app
from moe_bench.cli.options import (
    JsonOption,
    NumGpusOption,
    ScaleOption,
    SetOption,
    make_console,
    plan_of,
    print_view,
    rank_here,
)
from moe_bench.errors import BadInputError

if TYPE_CHECKING:
    from moe_bench.harness.data.tokenizer import Tokenizer
    from moe_bench.spec.rendezvous import Rendezvous
    from moe_bench.spec.sampling import Sampling
    from moe_bench.spec.scale import Plan
    from moe_bench.spec.training import TrainingJob

BYTES = "bytes"

SourceArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="Folder of a checkpoint, or of a run for its newest one.")
]
RecipeOption = Annotated[
    str | None,
    typer.Option("--recipe", help="Recipe of the checkpoint; default: that of its run."),
]
OwnScaleOption = Annotated[
    ScaleOption | None, typer.Option("--scale", help="Scale, as for train; default: that of its run.")
]


@app.command(rich_help_panel=MODEL)
def evaluate(
    source: SourceArgument,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="PREFIX", help="Dataset; default: what the run held out."),
    ] = None,
    held_out_fraction: Annotated[
        float | None,
        typer.Option(
            "--held-out", min=1e-9, max=1, help="With --data: only this last fraction of its documents."
        ),
    ] = None,
    recipe: RecipeOption = None,
    scale: OwnScaleOption = None,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give loss and perplexity of a checkpoint on a dataset, in any layout."""
    from moe_bench.results.training_run import find_checkpoint

    checkpoint, job = find_checkpoint(source)
    if data is None:
        if job is None:
            raise BadInputError("--data: on what? name a dataset of moe-bench data build")
        data = job.data
        held_out_fraction = held_out_fraction or job.validation_fraction
    plan = _plan(job, recipe, scale=scale, num_gpus=num_gpus, changes=changes)
    here = _announced(plan)
    from moe_bench.harness.start import quiet_imports
    from moe_bench.report.evaluation_view import evaluation_json, evaluation_view
    from moe_bench.spec.derive_training import require_same_tokenizer

    with quiet_imports():
        from moe_bench.harness.data.build import read_manifest
        from moe_bench.harness.training import evaluate as harness
    if job is not None:
        require_same_tokenizer(job, read_manifest(Path(data)).tokenizer, data)
    question = harness.Question(
        plan=plan, checkpoint=checkpoint, data=data, held_out_fraction=held_out_fraction
    )
    found = harness.evaluate(question, rendezvous=here)
    if here is None or here.rank == 0:
        print_view(evaluation_view(found), evaluation_json(found), as_json)


@app.command(rich_help_panel=MODEL)
def generate(
    source: SourceArgument,
    prompt: Annotated[str, typer.Option("--prompt", help="Text to continue.")],
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", min=1, help="Most tokens to add; the model may end the text before."
        ),
    ] = 100,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0, help="0 takes the most likely token.")
    ] = 0.0,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Draw from this many likeliest tokens only.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of the draws.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            "--tokenizer",
            metavar="bytes|DIR",
            help="`bytes`, or a folder; default: that of the run's dataset.",
        ),
    ] = None,
    recipe: RecipeOption = None,
    scale: OwnScaleOption = None,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue a text, by the recipe's own forward pass."""
    from moe_bench.results.training_run import find_checkpoint

    sampling = _sampling(temperature, top_k, seed)
    checkpoint, job = find_checkpoint(source)
    plan = _plan(job, recipe, scale=scale, num_gpus=num_gpus, changes=changes)
    chosen = _tokenizer(tokenizer, job)
    here = _announced(plan)
    from moe_bench.harness.start import quiet_imports
    from moe_bench.report.evaluation_view import generation_json, generation_view

    with quiet_imports():
        from moe_bench.harness.training import generate as harness
    asked = harness.Prompt(
        plan=plan, checkpoint=checkpoint, text=prompt, max_new_tokens=max_new_tokens, sampling=sampling
    )
    found = harness.generate(asked, chosen, rendezvous=here)
    if here is None or here.rank == 0:
        print_view(generation_view(found), generation_json(found), as_json)


def _sampling(temperature: float, top_k: int | None, seed: int) -> Sampling:
    from moe_bench.spec.sampling import Sampling

    if top_k is not None and temperature == 0:
        raise BadInputError("--top-k: at temperature 0 the most likely token is taken; add --temperature")
    return Sampling(temperature=temperature, top_k=top_k, seed=seed)


def _plan(
    job: TrainingJob | None,
    recipe: str | None,
    *,
    scale: ScaleOption | None,
    num_gpus: int | None,
    changes: list[str] | None,
) -> Plan:
    """The recipe of the run with what it was changed by, or the one that was named."""
    from moe_bench.spec.derive_training import training_plan

    before = None if job is None else job.asked
    if recipe is None and before is not None:
        recipe, changes = before.recipe, [*before.changes, *(changes or ())]
        num_gpus = num_gpus or before.num_gpus
    if recipe is None:
        raise BadInputError("--recipe: what is it a checkpoint of? name a model, a run of it or a YAML file")
    if scale is None:
        scale = ScaleOption.FULL if before is None else ScaleOption(before.scale)
    return training_plan(plan_of(recipe, scale=scale, num_gpus=num_gpus, changes=changes, rounds=True))


def _announced(plan: Plan) -> Rendezvous | None:
    """Where this process is among the ranks, the first of which says what is substituted."""
    from moe_bench.report.progress import announce

    here = rank_here()
    if here is None or here.rank == 0:
        announce(plan, make_console(stderr=True))
    return here


def _tokenizer(name: str | None, job: TrainingJob | None) -> Tokenizer:
    """The one that was named, or the one that the run's dataset was made with."""
    from moe_bench.harness.start import quiet_imports
    from moe_bench.spec.derive_training import require_same_tokenizer

    with quiet_imports():
        from moe_bench.harness.data import tokenizer as tokenizers
        from moe_bench.harness.data.build import read_manifest
    if name == BYTES:
        found = tokenizers.byte_tokenizer()
    elif name is not None:
        found = tokenizers.huggingface_tokenizer(Path(name))
    elif job is not None:
        found = tokenizers.tokenizer_of(job.tokenizer or read_manifest(Path(job.data)).tokenizer)
    else:
        raise BadInputError(f"--tokenizer: which one? it lies in no run; name {BYTES} or a folder")
    if job is not None:
        require_same_tokenizer(job, found.spec, "--tokenizer")
    return found
