"""Verbs about models themselves: verify, convert."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import MODEL, app
from moe_bench.cli.options import (
    JsonOption,
    ResultsRootOption,
    ScaleOption,
    SetOption,
    make_console,
    make_loader,
    plan_of,
    print_view,
    results_root,
)
from moe_bench.errors import BadInputError, MeasurementError
from moe_bench.spec.catalogue import data_root, recipe_model_keys

if TYPE_CHECKING:
    from moe_bench.checkpoints.rule import Rule
    from moe_bench.spec.model import ModelSpec

GB = 1_000_000_000
DEFAULT_SHARD_BYTES = 5 * GB
"""Of a file of Hugging Face's, as transformers' `save_pretrained` by default."""


@app.command(rich_help_panel=MODEL)
def verify(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(help="<model>, <model>/<run> or a YAML file; a bare model means its default run."),
    ] = None,
    is_all: Annotated[
        bool, typer.Option("--all", help="Verify every shipped model that Hugging Face has.")
    ] = False,
    changes: SetOption = None,
    out: ResultsRootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that a recipe's model is Hugging Face's: logits and gradients of one step on the same weights."""
    from moe_bench.checkpoints.family import family_of

    if bool(recipes) == is_all:
        raise BadInputError("verify: which models? name some, or --all for every one that Hugging Face has")
    names = recipes or _models_of_huggingface()
    plans = [plan_of(recipe, scale=ScaleOption.FULL, num_gpus=None, changes=changes) for recipe in names]
    for plan in plans:
        family_of(plan.recipe.model)  # a model without a map is refused before anything is loaded
    from moe_bench.harness.start import quiet_imports, require_package
    from moe_bench.launch.environment import current_environment
    from moe_bench.report.verify_view import difference, verifications_json, verifications_view
    from moe_bench.results.verification import write_verification

    require_package("transformers", extra="huggingface")
    with quiet_imports():
        from moe_bench.harness.convert.verify import verify as proof_of
    host, root = make_loader().system("cpu_host"), out or results_root()
    console = make_console(stderr=True)

    def say(key: str, layout: str) -> None:
        console.print(f"{key}: {layout}", highlight=False)

    found = {}
    for plan in plans:
        proof = proof_of(
            plan.recipe,
            host=host,
            environment=current_environment(),
            command=("moe-bench", *sys.argv[1:]),
            source_root=data_root(),
            on_layout=partial(say, plan.recipe.model.key),
        )
        found[write_verification(root, proof)] = proof
    print_view(verifications_view(found), verifications_json(found), as_json)
    refuted = [difference(proof) for proof in found.values() if not proof.is_proven]
    if refuted:
        raise MeasurementError("\n".join(refuted))


def _models_of_huggingface() -> list[str]:
    loader = make_loader()
    keys = recipe_model_keys(loader.root)
    return [key for key in keys if loader.model(key).hf_model_type is not None]


class Side(StrEnum):
    """The two ways of storing a model."""

    MEGATRON = "megatron"
    HUGGINGFACE = "huggingface"


@app.command(rich_help_panel=MODEL)
def convert(
    source: Annotated[Path, typer.Argument(help="Folder of the checkpoint to read.")],
    target: Annotated[Path, typer.Argument(help="Folder to write.")],
    model: Annotated[
        str, typer.Option("--model", help="Recipe of the checkpoint: <model>, <model>/<run> or a YAML file.")
    ],
    to: Annotated[Side, typer.Option("--to", help="Format to write.")],
    mtp: Annotated[
        bool,
        typer.Option("--mtp/--no-mtp", help="Whether the checkpoint holds the model's prediction modules."),
    ] = True,
    max_shard_gb: Annotated[
        float, typer.Option("--max-shard-gb", min=1e-6, help="Largest file in Hugging Face's format.")
    ] = DEFAULT_SHARD_BYTES / GB,
    scale: Annotated[
        ScaleOption, typer.Option("--scale", help="smoke: the recipe's toy.")
    ] = ScaleOption.FULL,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Convert a checkpoint between Hugging Face's safetensors and Megatron-Core's torch_dist."""
    from moe_bench.checkpoints.family import family_of
    from moe_bench.report.convert_view import convert_json, convert_progress, convert_view

    spec = plan_of(model, scale=scale, num_gpus=None, changes=changes).recipe.model
    if not mtp:
        spec = spec.model_copy(update={"num_mtp_layers": 0})
    rules = tuple(family_of(spec).rules(spec, num_mtp_layers=spec.num_mtp_layers))
    with convert_progress(rules, make_console(stderr=True)) as on_tensor:
        if to is Side.MEGATRON:
            _to_megatron(spec, rules, source, target, on_tensor)
        else:
            _to_huggingface(spec, rules, source, target, int(max_shard_gb * GB), on_tensor)
    print_view(convert_view(rules, target), convert_json(rules, target), as_json)


def _to_megatron(
    model: ModelSpec, rules: Sequence[Rule], source: Path, target: Path, on_tensor: Callable[[Rule], None]
) -> None:
    from moe_bench.checkpoints.config import require_same_config
    from moe_bench.checkpoints.family import family_of
    from moe_bench.checkpoints.safetensors_folder import CONFIG, logical_tensors, read_config, require_match

    config = family_of(model).config(model)
    require_same_config(model, config, read_config(source), path=source / CONFIG)
    tensors = logical_tensors(source)
    require_match(tensors, rules, folder=source)
    from moe_bench.harness.start import quiet_imports, require_package

    require_package("safetensors", extra="huggingface")
    with quiet_imports():
        from moe_bench.harness.convert.convert import convert_to_megatron
    convert_to_megatron(rules, tensors, target, on_tensor=on_tensor)


def _to_huggingface(
    model: ModelSpec,
    rules: Sequence[Rule],
    source: Path,
    target: Path,
    max_shard_bytes: int,
    on_tensor: Callable[[Rule], None],
) -> None:
    from moe_bench.checkpoints.family import family_of
    from moe_bench.harness.start import quiet_imports, require_package

    require_package("safetensors", extra="huggingface")
    with quiet_imports():
        from moe_bench.harness.convert.convert import to_huggingface
    to_huggingface(
        rules,
        source,
        target,
        config=family_of(model).config(model),
        max_shard_bytes=max_shard_bytes,
        on_tensor=on_tensor,
    )
