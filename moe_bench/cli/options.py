"""Options that several verbs share, and what every verb does with them: find the recipe, derive it, print."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import data_root, find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import KernelFamily, Routing

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from moe_bench.spec.problem import Problem
    from moe_bench.spec.recipe import Recipe
    from moe_bench.spec.rendezvous import Rendezvous
    from moe_bench.spec.scale import Plan

PIPE_WIDTH = 200
"""Columns of a table that is written into a pipe or a file."""


class ScaleOption(StrEnum):
    """Sizes at which a recipe runs."""

    FULL = "full"
    NODE = "node"
    SMOKE = "smoke"
    SLICE = "slice"
    TINY_SLICE = "tiny_slice"


class TableFormat(StrEnum):
    """Ways to print a table."""

    TERMINAL = "terminal"
    MARKDOWN = "markdown"
    CSV = "csv"


RecipeArgument = Annotated[
    str, typer.Argument(help="<model>, <model>/<run> or a YAML file; a bare model means its default run.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
ResultsRootOption = Annotated[
    Path | None, typer.Option("--out", help="Folder to write to; default: results/.")
]
ScaleOptionType = Annotated[
    ScaleOption,
    typer.Option(
        "--scale",
        help="full: as asked; node: real widths on --num-gpus; smoke: toy on CPU; "
        "slice: one rank on one GPU; tiny_slice: the same at toy size on CPU.",
    ),
]
NumGpusOption = Annotated[
    int | None,
    typer.Option(
        "--num-gpus",
        min=1,
        help="GPUs to run on: of the node with --scale node, else of the scaling family.",
    ),
]
KernelsOptionType = Annotated[
    KernelFamily | None,
    typer.Option("--kernels", help="With --scale slice: kernels; default: the recipe's."),
]
RoutingOption = Annotated[
    str,
    typer.Option(
        "--routing",
        metavar="HOW",
        help="With --scale slice: balanced, random, natural, or a JSON file of counts.",
    ),
]
StageOption = Annotated[
    int | None,
    typer.Option("--stage", help="With --scale slice: pipeline rank; default: the first with most experts."),
]
StrongOption = Annotated[
    bool, typer.Option("--strong", help="With --num-gpus: keep the global batch (strong scaling).")
]


def rank_here() -> Rendezvous | None:
    """Which rank of a job this process is, where a launcher has started it."""
    from moe_bench.launch.environment import current_environment
    from moe_bench.launch.rendezvous import rendezvous_from
    from moe_bench.launch.runner import run_captured

    return rendezvous_from(current_environment(), run_captured)


def make_loader() -> Loader:
    """A loader that refuses what cannot run."""
    from moe_bench.spec.legality import legality_problems

    return Loader(root=recipes_root(), rules=(legality_problems, _override_problems))


def _override_problems(recipe: Recipe) -> tuple[Problem, ...]:
    """The rule on `mcore:` blocks, loaded only for a recipe that has one."""
    if not recipe.mcore:
        return ()
    from moe_bench.harness.mcore_config import override_problems

    return override_problems(recipe)


def plan_of(
    name: str,
    *,
    scale: ScaleOption,
    num_gpus: int | None,
    changes: list[str] | None,
    strong: bool = False,
    one_rank: OneRank | None = None,
    rounds: bool = False,
) -> Plan:
    """What `name` runs at `scale`; `one_rank` is what was asked of a slice.

    `rounds`: whether the verb does what `quantization` says; the others refuse a recipe that has one.
    """
    loader = make_loader()
    path = find_recipe(name, loader)
    return derived_plan(
        path,
        loader=loader,
        scale=scale,
        num_gpus=num_gpus,
        changes=changes,
        strong=strong,
        one_rank=one_rank,
        rounds=rounds,
    )


def derived_plan(
    path: Path,
    *,
    loader: Loader,
    scale: ScaleOption,
    num_gpus: int | None,
    changes: list[str] | None,
    strong: bool = False,
    one_rank: OneRank | None = None,
    rounds: bool = False,
) -> Plan:
    """What the recipe in `path` runs at `scale`, with the user's changes; RecipeError if it is illegal.

    `num_gpus` is the size of the node at node scale, and else names a member of the scaling family.
    """
    # rules and toys are loaded by those who ask for a plan: `list` and the readers of results do not
    from moe_bench.spec.check import require_legal
    from moe_bench.spec.scale import full_plan, smoke_plan

    is_slice = scale in (ScaleOption.SLICE, ScaleOption.TINY_SLICE)
    if one_rank not in (None, OneRank()) and not is_slice:
        raise BadInputError("--kernels, --routing and --stage are of a slice; add --scale slice or drop them")
    has_family = scale in (ScaleOption.FULL, ScaleOption.SMOKE)
    if strong and (num_gpus is None or not has_family):
        raise BadInputError("--strong says how --num-gpus scales a recipe or its toy; drop it")
    if num_gpus is not None and has_family:
        from moe_bench.spec.family import scaled_plan

        plan = derived_plan(path, loader=loader, scale=scale, num_gpus=None, changes=changes, rounds=rounds)
        return scaled_plan(plan, num_gpus, strong=strong)
    modified = tuple(changes or ())
    recipe = loader.recipe(path, changes=modified)
    if not rounds:
        require_unquantised(recipe)
    if scale is ScaleOption.SMOKE:
        toy = smoke_plan(recipe, host=loader.system("cpu_host"), modified=modified)
        return require_legal(toy, path, loader)
    if is_slice:
        if num_gpus is not None:
            raise BadInputError(f"--num-gpus: a {scale.value} is one rank of the recipe; drop it")
        plan = _slice(recipe, loader, scale=scale, modified=modified, one_rank=one_rank or OneRank())
        return require_legal(plan, path, loader)
    if scale is ScaleOption.NODE:
        from moe_bench.analysis.memory import fits
        from moe_bench.spec.derive_node import node_plan

        if num_gpus is None:
            raise BadInputError("--scale node: how many GPUs? add --num-gpus N")
        cut = node_plan(recipe, num_gpus=num_gpus, fits=fits, modified=modified)
        return require_legal(cut, path, loader)
    return full_plan(recipe, modified=modified)


def require_unquantised(recipe: Recipe) -> None:
    """Raise BadInputError for a recipe that a verb would time, count or project without its quantisers."""
    if recipe.quantization is not None:
        raise BadInputError(
            f"{recipe.name}: quantization: train, evaluate, generate and quantize alone round so, at the "
            "speed of no format; add --set quantization=null"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OneRank:
    """What was typed about a slice."""

    kernels: KernelFamily | None = None
    routing: str = "balanced"
    stage: int | None = None

    def arguments(self) -> tuple[str, ...]:
        """The options again, for a command that starts the same run."""
        arguments = [] if self.kernels is None else ["--kernels", self.kernels]
        arguments += [] if self.routing == "balanced" else ["--routing", self.routing]
        arguments += [] if self.stage is None else ["--stage", str(self.stage)]
        return tuple(arguments)


def _slice(
    recipe: Recipe, loader: Loader, *, scale: ScaleOption, modified: tuple[str, ...], one_rank: OneRank
) -> Plan:
    from moe_bench.analysis.memory import rank_fits
    from moe_bench.spec.derive_slice import SliceChoice, slice_plan, tiny_slice_plan

    choice = SliceChoice(kernels=one_rank.kernels, routing=_routing(one_rank.routing), stage=one_rank.stage)
    if scale is ScaleOption.TINY_SLICE:
        return tiny_slice_plan(recipe, host=loader.system("cpu_host"), modified=modified, choice=choice)
    return slice_plan(recipe, fits=rank_fits, modified=modified, choice=choice)


def _routing(text: str) -> Routing:
    from moe_bench.spec.routing_trace import read_trace

    if text == "balanced":
        return Routing(mode="round_robin")
    if text == "random":
        return Routing(mode="random_logits")
    if text == "natural":
        return Routing(mode="natural")
    choices = "balanced, random, natural, or a JSON file with a list of tokens per expert for each layer"
    if not text.endswith(".json"):
        raise BadInputError(f"--routing {text}: unknown; write {choices}")
    return Routing(mode="recorded", trace=read_trace(Path(text), option="--routing", choices=choices))


def run_arguments(
    name: str,
    *,
    scale: ScaleOption,
    num_gpus: int | None,
    changes: list[str] | None,
    strong: bool = False,
) -> tuple[str, ...]:
    """What follows `moe-bench run` in the job that `submit` queues."""
    arguments = [name, "--scale", scale.value]
    if num_gpus is not None:
        arguments += ["--num-gpus", str(num_gpus)]
    if strong:
        arguments += ["--strong"]
    for change in changes or ():
        arguments += ["--set", change]
    return tuple(arguments)


def whole_numbers(text: str, *, option: str, example: str) -> tuple[int, ...]:
    """What was listed behind `option`, in its order; BadInputError for anything but numbers from 1."""
    words = [word.strip().replace("_", "") for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise BadInputError(f"{option} {text}: write whole numbers, as {example}")
    return tuple(map(int, words))


def require_one_output(**asked: object) -> None:
    """Refuse options that each print something else, of which all but one would be ignored."""
    given = [f"--{name.replace('_', '-')}" for name, value in asked.items() if value]
    if len(given) > 1:
        raise BadInputError(f"{', '.join(given)}: each prints something else; keep one of them")


def results_root() -> Path:
    """`results/` of the checkout, or of the working directory where moe_bench is installed as a wheel."""
    root = data_root()
    return root / "results" if (root / "pyproject.toml").is_file() else Path("results")


def record_places(named: list[Path] | None) -> tuple[Path, ...]:
    """Where records are read from: what was named, else `results/` where there is one."""
    return tuple(named or filter(Path.is_dir, [results_root()]))


def terminal_width() -> int | None:
    """Columns of the terminal that is printed to; None into a pipe or a file."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def print_view(view: RenderableType, data: object, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(data, indent=1))
    else:
        make_console(stderr=False).print(view, crop=False)


def make_console(*, stderr: bool) -> Console:
    """A pipe has no width of its own; tables should not be folded there to the 80 columns of a default."""
    from rich.console import Console

    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=PIPE_WIDTH)
