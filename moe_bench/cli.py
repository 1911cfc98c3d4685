"""The command line: each verb parses, calls one function and prints."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from moe_bench import __version__
from moe_bench.errors import EXIT_CODES, BadInputError, MoeBenchError
from moe_bench.spec.catalogue import data_root, find_recipe, recipe_paths, recipes_root
from moe_bench.spec.legality import Problem, legality_problems
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.scale import Plan, full_plan, node_plan, smoke_plan

_EXIT_CODES = "Exit codes: " + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES) + "."

app = typer.Typer(
    help="Recipes, measurements and published numbers of Mixture-of-Experts training on Megatron-Core.",
    epilog=_EXIT_CODES,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)

_RECIPES, _RUN, _READ = "Recipes", "Run", "Read"
PIPE_WIDTH = 200


class ScaleOption(StrEnum):
    """Sizes at which a recipe runs."""

    FULL = "full"
    NODE = "node"
    SMOKE = "smoke"


class TableFormat(StrEnum):
    """Ways to print a table."""

    TERMINAL = "terminal"
    MARKDOWN = "markdown"
    CSV = "csv"


RecipeArgument = Annotated[
    str, typer.Argument(help="<model>, <model>/<run> or a YAML file; a bare model means its default run.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Derive another recipe; repeatable.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ScaleOptionType = Annotated[
    ScaleOption,
    typer.Option("--scale", help="full: as asked; node: real widths on --num-gpus; smoke: toy on CPU."),
]
NumGpusOption = Annotated[int | None, typer.Option("--num-gpus", min=1, help="GPUs for --scale node.")]


@app.command("list", rich_help_panel=_RECIPES)
def list_recipes(
    model: Annotated[str | None, typer.Argument(help="Only this model's recipes.")] = None,
    defaults: Annotated[
        bool, typer.Option("--defaults", help="The default run of every model, as a Markdown table.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """The recipes that are here."""
    from moe_bench.report.recipe_list import recipe_line, recipe_table

    loader = _loader()
    if model is not None:
        find_recipe(model, loader)
    if defaults:
        from moe_bench.report.defaults import defaults_markdown

        models = sorted(path.parent.name for path in loader.root.glob("*/model.yaml"))
        runs = [loader.recipe(find_recipe(key, loader)) for key in models]
        typer.echo(defaults_markdown(runs, data_root() / "results" / "published"))
        return
    paths = [path for path in recipe_paths(loader.root) if model in (None, path.parent.name)]
    recipes = [loader.recipe(path) for path in paths]
    _print(recipe_table(recipes), [recipe_line(recipe) for recipe in recipes], as_json)


@app.command(rich_help_panel=_RECIPES)
def show(
    recipe: RecipeArgument,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    params: Annotated[
        bool, typer.Option("--params", help="Parameters by part, beside the published ones.")
    ] = False,
    megatron: Annotated[bool, typer.Option("--megatron", help="Megatron-Core's arguments.")] = False,
    as_json: JsonOption = False,
) -> None:
    """One recipe, what follows from it, and what Megatron-Core is given."""
    from moe_bench.analysis.size import counted_size
    from moe_bench.harness.mcore_config import as_json as arguments_json
    from moe_bench.harness.mcore_config import megatron_arguments
    from moe_bench.report.show import arguments_view, plan_view, size_json, size_view

    plan = _plan(recipe, scale=scale, num_gpus=num_gpus, changes=changes)
    if params:
        size = counted_size(plan.recipe.model)
        _print(size_view(size), size_json(size), as_json)
    elif megatron:
        arguments = megatron_arguments(plan.recipe)
        _print(arguments_view(arguments), arguments_json(arguments), as_json)
    else:
        _print(plan_view(plan), plan.model_dump(mode="json"), as_json)


@app.command(rich_help_panel=_RECIPES)
def schema() -> None:
    """The JSON schema of a recipe file, for editors."""
    from moe_bench.spec.schema import recipe_file_schema

    typer.echo(json.dumps(recipe_file_schema(), indent=2))


@app.command(rich_help_panel=_RUN)
def run(
    recipe: RecipeArgument,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for the record.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Train a few steps through Megatron-Core, write a record and print its table."""
    from moe_bench.launch.environment import current_environment
    from moe_bench.launch.here import start_ranks_here
    from moe_bench.launch.rendezvous import rendezvous_from
    from moe_bench.launch.runner import run_captured

    plan = _plan(recipe, scale=scale, num_gpus=num_gpus, changes=changes)
    environment = current_environment()
    place = rendezvous_from(environment, run_captured)
    if place is None and plan.recipe.system.gpu is not None:
        start_ranks_here(plan.recipe, asked=plan.asked, run_args=tuple(sys.argv[2:]), run=run_captured)
    from moe_bench.harness.start import load_measure
    from moe_bench.report.progress import announce, step_progress
    from moe_bench.report.tables import run_json, run_view
    from moe_bench.results.store import write_record

    console = _console(stderr=True)
    if place is None or place.rank == 0:
        announce(plan, console)
    measure = load_measure()
    with step_progress(plan, console, is_alone=place is None) as on_step:
        record = measure(
            plan,
            rendezvous=place,
            environment=environment,
            command=tuple(sys.argv),
            source_root=data_root(),
            on_step=on_step,
        )
    if record is not None:  # rank 0 reports for all
        path = write_record(out or _results_root(), record)
        _print(run_view(record, path), run_json(record, path), as_json)


@app.command(rich_help_panel=_RUN)
def submit(
    recipe: RecipeArgument,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    site: Annotated[
        str | None, typer.Option("--site", help="A file of slurm/sites; default: by cluster.")
    ] = None,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="Nodes, where the fewest are not meant.")
    ] = None,
    wait: Annotated[bool, typer.Option("--wait", help="Stay, and end with the job's exit code.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the command that would be run.")] = False,
    inside_job: Annotated[bool, typer.Option("--inside-job", hidden=True)] = False,
    as_json: JsonOption = False,
) -> None:
    """Queue a recipe with Slurm at the size that it needs."""
    from moe_bench.launch.verbs import submit_verb

    plan = _plan(recipe, scale=scale, num_gpus=num_gpus, changes=changes)
    outcome = submit_verb(
        plan.recipe,
        run_args=_run_arguments(recipe, scale=scale, num_gpus=num_gpus, changes=changes),
        data_root=data_root(),
        site=site,
        num_nodes=nodes,
        dry_run=dry_run,
        inside_job=inside_job,
    )
    if outcome.lines and not as_json:
        typer.echo("\n".join(outcome.lines))
    if as_json:
        typer.echo(json.dumps(outcome.as_json()))
    raise typer.Exit(outcome.wait() if wait else outcome.exit_code)


@app.command(rich_help_panel=_READ)
def report(
    results: Annotated[
        list[Path] | None, typer.Argument(help="Records or folders of them; default: results/.")
    ] = None,
    table_format: Annotated[
        TableFormat, typer.Option("--format", help="How to print.")
    ] = TableFormat.TERMINAL,
    as_json: JsonOption = False,
) -> None:
    """A table of records: step time, tokens/s/GPU, TFLOPs/GPU, MFU, memory."""
    from moe_bench.report.frame import as_csv, as_markdown, frame_view, records_frame
    from moe_bench.results.store import read_records

    frame = records_frame(tuple(read_records(tuple(results or (_results_root(),)))))
    if table_format is TableFormat.MARKDOWN:
        typer.echo(as_markdown(frame))
    elif table_format is TableFormat.CSV:
        typer.echo(as_csv(frame), nl=False)
    else:
        _print(frame_view(frame), json.loads(frame.to_json(orient="records")), as_json)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; errors that have a name are printed on one line and give their exit code."""
    try:
        code = app(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except MoeBenchError as error:
        typer.echo(str(error), err=True)
        return error.exit_code
    except typer.TyperException as error:
        typer.echo(str(error), err=True)
        return BadInputError.exit_code
    except typer.Abort:
        return 130
    return int(code or 0)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        typer.echo(__version__)
        raise typer.Exit


def _loader() -> Loader:
    return Loader(root=recipes_root(), rules=(legality_problems, _override_problems))


def _override_problems(recipe: Recipe) -> tuple[Problem, ...]:
    """The rule on `mcore:` blocks, loaded only for a recipe that has one."""
    if not recipe.mcore:
        return ()
    from moe_bench.harness.mcore_config import override_problems

    return override_problems(recipe)


def _plan(name: str, *, scale: ScaleOption, num_gpus: int | None, changes: list[str] | None) -> Plan:
    """What `name` runs at `scale`."""
    loader = _loader()
    modified = tuple(changes or ())
    recipe = loader.recipe(find_recipe(name, loader), changes=modified)
    if scale is ScaleOption.SMOKE:
        return smoke_plan(recipe, host=loader.system("cpu_host"), modified=modified)
    if scale is ScaleOption.NODE:
        from moe_bench.analysis.memory import fits

        if num_gpus is None:
            raise BadInputError("--scale node: how many GPUs? add --num-gpus N")
        return node_plan(recipe, num_gpus=num_gpus, fits=fits, modified=modified)
    if num_gpus is not None:
        raise BadInputError("--num-gpus goes with --scale node; a recipe's own size is parallel.num_gpus")
    return full_plan(recipe, modified=modified)


def _run_arguments(
    name: str, *, scale: ScaleOption, num_gpus: int | None, changes: list[str] | None
) -> tuple[str, ...]:
    """What follows `moe-bench run` in the job that `submit` queues."""
    arguments = [name, "--scale", scale.value]
    if num_gpus is not None:
        arguments += ["--num-gpus", str(num_gpus)]
    for change in changes or ():
        arguments += ["--set", change]
    return tuple(arguments)


def _results_root() -> Path:
    """`results/` of the checkout, or of the working directory where moe_bench is installed as a wheel."""
    root = data_root()
    return root / "results" if (root / "pyproject.toml").is_file() else Path("results")


def _print(view: RenderableType, data: object, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(data, indent=1))
    else:
        _console(stderr=False).print(view)


def _console(*, stderr: bool) -> Console:
    """A pipe has no width of its own; tables should not be folded there to the 80 columns of a default."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PIPE_WIDTH)
