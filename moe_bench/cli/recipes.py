"""Verbs about recipes: list, show, check, schema."""

from __future__ import annotations

import json
from functools import cache, partial
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import RECIPES, app
from moe_bench.cli.options import (
    JsonOption,
    KernelsOptionType,
    NumGpusOption,
    OneRank,
    RecipeArgument,
    RoutingOption,
    ScaleOption,
    ScaleOptionType,
    SetOption,
    StageOption,
    StrongOption,
    derived_plan,
    make_loader,
    plan_of,
    print_view,
    require_one_output,
    results_root,
    terminal_width,
)
from moe_bench.errors import BadInputError, MissingRequirementError, RecipeError
from moe_bench.spec.catalogue import (
    data_root,
    find_recipe,
    recipe_model_keys,
    recipe_paths,
    recipes_root,
)
from moe_bench.spec.load import Loader, UnknownNameError, mistake_at, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from moe_bench.results.published import PublishedRow
    from moe_bench.spec.scale import Plan


@app.command("list", rich_help_panel=RECIPES)
def list_recipes(
    model: Annotated[str | None, typer.Argument(help="Only this model's recipes.")] = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="Print the default run of every model as a Markdown table.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """List the recipes."""
    from moe_bench.report.recipe_list import parity_mark, recipe_line, recipe_list
    from moe_bench.results.parity import evidence_of, read_parities
    from moe_bench.spec.scale import full_plan

    # the shipped recipes are legal by test, and asking again would take as long as everything else
    loader = Loader(root=recipes_root(), rules=())
    models = recipe_model_keys(loader.root)
    if model is not None and model not in models:
        raise UnknownNameError("model with recipes", model, models)
    if defaults:
        from moe_bench.report.defaults import defaults_markdown

        require_one_output(defaults=defaults, json=as_json)
        runs = [loader.recipe(find_recipe(key, loader)) for key in models if model in (None, key)]
        typer.echo(defaults_markdown(runs, data_root() / "results" / "published"))
        return
    paths = [path for path in recipe_paths(loader.root) if model in (None, path.parent.name)]
    recipes = [loader.recipe(path) for path in paths]
    parities = {
        key: read_parities(results_root(), models=[key]) for key in {one.model.key for one in recipes}
    }
    marks = [
        parity_mark(evidence_of(parities[one.model.key], full_plan(one, modified=()))) for one in recipes
    ]
    if as_json:
        lines = [recipe_line(recipe, mark) for recipe, mark in zip(recipes, marks, strict=True)]
        typer.echo(json.dumps(lines, indent=1))
    else:
        typer.echo(recipe_list(recipes, marks, width=terminal_width()))


@app.command(rich_help_panel=RECIPES)
def show(
    recipe: RecipeArgument,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    strong: StrongOption = False,
    changes: SetOption = None,
    kernels: KernelsOptionType = None,
    routing: RoutingOption = "balanced",
    stage: StageOption = None,
    params: Annotated[
        bool, typer.Option("--params", help="Print parameters by part, beside the published counts.")
    ] = False,
    megatron: Annotated[
        bool, typer.Option("--megatron", help="Print the arguments that Megatron-Core gets.")
    ] = False,
    comms: Annotated[
        bool, typer.Option("--comms", help="Print what a rank communicates in one step.")
    ] = False,
    flops: Annotated[
        bool, typer.Option("--flops", help="Print what a rank's kernels compute in one step.")
    ] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Print what a rank holds at its fullest.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a recipe, what follows from it, and what Megatron-Core is given."""
    from moe_bench.analysis.size import counted_size
    from moe_bench.harness.mcore_config import as_json as arguments_json
    from moe_bench.harness.mcore_config import megatron_arguments
    from moe_bench.report.show import arguments_view, plan_view, size_json, size_view

    require_one_output(params=params, megatron=megatron, comms=comms, flops=flops, memory=memory)
    one_rank = OneRank(kernels=kernels, routing=routing, stage=stage)
    plan = plan_of(
        recipe, scale=scale, num_gpus=num_gpus, changes=changes, strong=strong, one_rank=one_rank, rounds=True
    )
    if params:
        size = counted_size(plan.recipe.model)
        print_view(size_view(size), size_json(size), as_json)
    elif megatron:
        arguments = megatron_arguments(plan.recipe)
        print_view(arguments_view(arguments), arguments_json(arguments), as_json)
    elif comms:
        from moe_bench.report.comms import comms_json, comms_view, stage_transfers

        stages = stage_transfers(plan.recipe)
        print_view(comms_view(stages), comms_json(plan.recipe, stages), as_json)
    elif flops:
        from moe_bench.report.rank_flops import rank_flops_json, rank_flops_view, stage_flops

        lines = stage_flops(plan.recipe)
        print_view(rank_flops_view(lines), rank_flops_json(plan.recipe, lines), as_json)
    elif memory:
        from moe_bench.analysis.memory import pipeline_memory
        from moe_bench.report.rank_memory import memory_json, memory_view

        ranks = pipeline_memory(plan.recipe)
        print_view(memory_view(plan.recipe, ranks), memory_json(plan.recipe, ranks), as_json)
    else:
        evidence = _evidence(plan) if plan.scale == "full" else {}
        print_view(plan_view(plan, evidence=evidence), plan.model_dump(mode="json"), as_json)


def _evidence(plan: Plan) -> dict[str, str]:
    """What `verify` last found of the model as it is, if it names a class, and `parity` of these settings."""
    from moe_bench.report.parity_view import evidence_line as parity_line
    from moe_bench.report.verify_view import evidence_line
    from moe_bench.results.parity import evidence_of, read_parities
    from moe_bench.results.verification import latest_verification

    root, model = results_root(), plan.recipe.model
    parity = parity_line(evidence_of(read_parities(root, models=[model.key]), plan), plan)
    if model.hf_model_type is None:
        return {"parity": parity}
    return {"model proof": evidence_line(latest_verification(root, model)), "parity": parity}


@app.command(rich_help_panel=RECIPES)
def check(
    recipes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE ...]", help="Recipes, YAML files or folders of them."),
    ] = None,
    is_all: Annotated[bool, typer.Option("--all", help="Check every shipped recipe.")] = False,
    rules: Annotated[
        bool, typer.Option("--rules", help="Print the rules with reasons and sources, as Markdown tables.")
    ] = False,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    strong: StrongOption = False,
    changes: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say whether recipes can run at all: one line per problem, with the reason and a fix."""
    from moe_bench.results.published import load_model_rows
    from moe_bench.spec.check import check_recipes, named_files

    if rules:
        from moe_bench.report.rules import rules_markdown

        require_one_output(rules=rules, all=is_all or recipes, json=as_json)
        typer.echo(rules_markdown())
        return
    loader = make_loader()
    derive = partial(
        derived_plan, loader=loader, scale=scale, num_gpus=num_gpus, changes=changes, strong=strong
    )
    rows_of = cache(partial(load_model_rows, data_root() / "results" / "published"))
    refused_by_run: dict[str, list[str]] = {}

    def ask(path: Path) -> None:
        plan = derive(path)
        _require_its_row(plan, path, rows_of)
        if (refusal := _refusal(plan)) is not None:
            refused_by_run.setdefault(refusal, []).append(plan.recipe.name)

    checked = check_recipes(named_files(recipes or (), loader, is_all=is_all), derive=ask)
    if as_json:
        typer.echo(json.dumps(checked.as_json(), indent=1))
    else:
        # what a --set breaks in every recipe is said once
        typer.echo("\n".join([*dict.fromkeys(map(str, checked.mistakes)), checked.summary]))
    for refusal, names in refused_by_run.items():
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        typer.echo(f"legal, but run refuses {names[0]}{others}: {refusal}", err=True)
    raise typer.Exit(BadInputError.exit_code if checked.num_refused else 0)


def _refusal(plan: Plan) -> str | None:
    """Why no installation runs `plan` today, though it is legal; None where one may."""
    from moe_bench.harness.mcore_config import megatron_arguments
    from moe_bench.harness.requirements import require_supported

    try:
        require_supported(megatron_arguments(plan.recipe))
    except MissingRequirementError as error:
        return str(error)
    return None


def _require_its_row(plan: Plan, path: Path, rows_of: Callable[[str], Iterable[PublishedRow]]) -> None:
    """Raise RecipeError where the recipe copies a row that nobody published, or differs from it unsaid."""
    from moe_bench.results.row_recipe import row_problems
    from moe_bench.spec.yaml_tree import read_yaml

    if problems := row_problems(plan, rows_of):
        tree = read_yaml(path, shown_as=shown(path))
        raise RecipeError(tuple(mistake_at(tree, one) for one in problems))


@app.command(rich_help_panel=RECIPES)
def schema() -> None:
    """Print the JSON schema of a recipe file, for editors."""
    from moe_bench.spec.schema import recipe_file_schema

    typer.echo(json.dumps(recipe_file_schema(), indent=2))
