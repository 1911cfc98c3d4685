"""The verb that measures one MoE layer alone, forward and backward, part by part: layer."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import RUN, app
from moe_bench.cli.files import picture_to_write
from moe_bench.cli.gpu import DEFAULT_SYSTEM, PlannedSystemOption, gpu_here, system_of_gpu
from moe_bench.cli.options import (
    JsonOption,
    ResultsRootOption,
    SetOption,
    make_loader,
    print_view,
    require_unquantised,
    results_root,
)
from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.spec.catalogue import data_root, find_recipe
from moe_bench.spec.layer_case import (
    LayerCase,
    LayerRouting,
    layer_case_of,
    layer_differences,
    sweep_of,
    traced_routing,
)
from moe_bench.spec.recipe import KernelFamily, Precision

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from moe_bench.results.layer_record import LayerRecord
    from moe_bench.spec.load import Loader
    from moe_bench.spec.recipe import Recipe
    from moe_bench.spec.system import SystemSpec

TINY_SCALE = 16
"""What a suite's sizes are divided by for toys."""
_POWER_LAW = "power_law:"
_ROUTING = f"balanced, random, {_POWER_LAW}EXPONENT, or a JSON file of tokens per expert for each layer"


class ExpertsOption(StrEnum):
    """Ways to run the experts."""

    TORCH_NATIVE = "torch_native"
    TRANSFORMER_ENGINE = "transformer_engine"
    QUACK = "quack"
    SEQUENTIAL = "sequential"


_FAMILIES: dict[str, KernelFamily] = {
    ExpertsOption.TORCH_NATIVE: "torch_native",
    ExpertsOption.TRANSFORMER_ENGINE: "transformer_engine",
    ExpertsOption.QUACK: "quack",
    ExpertsOption.SEQUENTIAL: "torch_native",
}
_PLANNED = (ExpertsOption.TORCH_NATIVE, ExpertsOption.QUACK)
"""Families of a suite's plan: those of ours that should win it."""


class ExchangeOption(StrEnum):
    """Dispatchers that one rank can run alone."""

    ALLTOALL = "alltoall"
    ALLGATHER = "allgather"


class SuiteOption(StrEnum):
    """Layers that others have published rates of."""

    SONICMOE = "sonicmoe"


LayerOfArgument = Annotated[
    str | None, typer.Argument(help="<model>, <model>/<run> or a YAML file; one of its layers runs.")
]
SuiteArgument = Annotated[
    SuiteOption | None,
    typer.Option("--suite", help="Time the layers of a publication instead of a recipe's."),
]
TokensArgument = Annotated[
    int | None, typer.Option("--tokens", min=1, help="Tokens of the rank; default: those of a micro batch.")
]
RoutingArgument = Annotated[
    str | None, typer.Option("--routing", metavar="HOW", help=f"Tokens per expert: {_ROUTING}.")
]
PrecisionArgument = Annotated[
    Precision | None,
    typer.Option("--precision", help="Precision of the experts' products; default: the recipe's."),
]
ExpertsArgument = Annotated[
    list[ExpertsOption] | None,
    typer.Option(
        "--experts", help="Kernels of the experts; repeatable. Default: the recipe's; for a suite all here."
    ),
]
ExchangeArgument = Annotated[
    ExchangeOption, typer.Option("--dispatcher", help="Dispatcher, of those that one rank can run alone.")
]
FoldedArgument = Annotated[
    bool, typer.Option("--folded", help="Take the rank's experts as a layer without expert parallelism.")
]
SweepArgument = Annotated[
    bool, typer.Option("--sweep", help="Time balanced loads, then ever steeper power laws.")
]
PlotArgument = Annotated[
    Path | None,
    typer.Option("--plot", callback=picture_to_write, help="With --sweep: draw it (.png, .svg, .pdf)."),
]
HeldArgument = Annotated[
    float | None,
    typer.Option("--held-seconds", min=0.1, help="Also time the layer without a pause for so long."),
]
GraphArgument = Annotated[
    bool, typer.Option("--graph", help="Also time the layer as CUDA graphs; needs a GPU.")
]
PeersArgument = Annotated[
    str | None,
    typer.Option(
        "--peers", metavar="all|NAME,...", help="Also time other engines on the same weights and inputs."
    ),
]
PlanArgument = Annotated[
    bool, typer.Option("--plan", help="Print what is projected for each layer, and measure nothing.")
]


@app.command(rich_help_panel=RUN)
def layer(
    recipe: LayerOfArgument = None,
    suite: SuiteArgument = None,
    tokens: TokensArgument = None,
    routing: RoutingArgument = None,
    precision: PrecisionArgument = None,
    experts: ExpertsArgument = None,
    dispatcher: ExchangeArgument = ExchangeOption.ALLTOALL,
    folded: FoldedArgument = False,
    sweep: SweepArgument = False,
    plot: PlotArgument = None,
    held_seconds: HeldArgument = None,
    graph: GraphArgument = False,
    peers: PeersArgument = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="Time toy sizes, on any machine.")] = False,
    plan: PlanArgument = False,
    system: PlannedSystemOption = None,
    changes: SetOption = None,
    out: ResultsRootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Time one MoE layer alone and its parts: router, permute, dispatch, expert GEMMs, combine, unpermute."""
    if (recipe is None) == (suite is None):
        raise BadInputError("layer: name a recipe, or a suite with --suite; one of the two")
    if changes and recipe is None:
        raise BadInputError("--set changes a recipe and a suite has none; drop it")
    if plot is not None and not sweep:
        raise BadInputError("--plot draws a sweep; add --sweep, or drop it")
    if system is not None and not plan:
        raise BadInputError("--system estimates without a GPU; add --plan, or drop it")
    if plan:
        uneven = None if routing == "balanced" else routing
        _require_none_given(sweep=sweep, held_seconds=held_seconds, graph=graph, peers=peers, routing=uneven)
    loader = make_loader()
    asked = None if recipe is None else loader.recipe(find_recipe(recipe, loader), changes=changes or ())
    chosen = _Chosen(
        layers=tuple(
            _Layer(_changed(one.case, routing, precision, dispatcher, folded=folded), one.differences)
            for one in _layers(asked, loader, tokens=tokens, tiny=tiny)
        ),
        experts=tuple(one.value for one in experts or ()),
        suite=None if suite is None else suite.value,
        is_sweep=sweep,
        is_tiny=tiny,
        held_for_s=held_seconds,
        is_graphed=graph,
        peers=None if peers is None else tuple(name for name in peers.split(",") if name != "all"),
    )
    if plan:
        _print_plan(chosen, _planned_system(system, asked, loader), as_json=as_json)
        return
    here = _system(loader, is_tiny=tiny)
    written = list(_measured(chosen, here, out or results_root()))
    _show(written, chosen, here, as_json=as_json)
    if plot is not None:
        from moe_bench.report.layer_plot import write_sweep_plot

        write_sweep_plot([record for _, record in written], plot)


def _require_none_given(**measured: object) -> None:
    """Refuse options by which a plan, which is of balanced loads, would not be another."""
    given = [f"--{name.replace('_', '-')}" for name, value in measured.items() if value]
    if given:
        raise BadInputError(f"--plan measures nothing and takes loads as balanced; drop {', '.join(given)}")


def _planned_system(key: str | None, recipe: Recipe | None, loader: Loader) -> SystemSpec:
    """The one that was named, else the GPU of this machine, else the recipe's own."""
    if key is not None:
        return loader.system(key)
    gpu = gpu_here()
    if gpu is not None:
        return system_of_gpu(gpu, loader)
    return loader.system(DEFAULT_SYSTEM) if recipe is None else recipe.system


def _print_plan(chosen: _Chosen, system: SystemSpec, *, as_json: bool) -> None:
    from moe_bench.report.layer_plan_view import layer_plan_json, layer_plan_view, planned_layers
    from moe_bench.spec.derive_layer import case_on, layer_obstacle

    experts = chosen.experts or (_PLANNED if chosen.suite is not None else ())
    asked = [
        case_on(one.case, _FAMILIES[name], system, is_grouped=name != ExpertsOption.SEQUENTIAL)
        if name
        else one.case
        for one in chosen.layers
        for name in experts or (None,)
    ]
    obstacles = [layer_obstacle(case, system) for case in asked]
    cases = [case for case, obstacle in zip(asked, obstacles, strict=True) if obstacle is None]
    for case, obstacle in zip(asked, obstacles, strict=True):
        if obstacle is not None:
            typer.echo(f"{case.name}: not on {case.kernels.family}: {obstacle}", err=True)
    if not cases:
        raise MissingRequirementError(f"nothing that was asked for can be built on {system.key}")
    planned = planned_layers(cases, system)
    print_view(layer_plan_view(planned, system), layer_plan_json(planned), as_json)


def _system(loader: Loader, *, is_tiny: bool) -> SystemSpec:
    """This machine's, or for toys without a GPU the host; MissingRequirementError for real sizes without."""
    gpu = gpu_here()
    if gpu is not None:
        return system_of_gpu(gpu, loader)
    if is_tiny:
        return loader.system("cpu_host")
    raise MissingRequirementError(
        "layer needs a GPU and this machine has none; run it at toy size on the CPU with --tiny"
    )


@dataclass(frozen=True, slots=True)
class _Layer:
    """What is measured, and what is otherwise than in the recipe that it is of."""

    case: LayerCase
    differences: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chosen:
    """What was asked for, read."""

    layers: tuple[_Layer, ...]
    experts: tuple[str, ...]
    suite: str | None
    is_sweep: bool
    is_tiny: bool
    held_for_s: float | None
    is_graphed: bool
    peers: tuple[str, ...] | None


def _layers(asked: Recipe | None, loader: Loader, *, tokens: int | None, tiny: bool) -> Iterator[_Layer]:
    """The layer of a recipe, or those of the suite where there is none."""
    from moe_bench.results.sonicmoe import SHAPES
    from moe_bench.spec.scale import smoke_plan

    if asked is None:
        for shape in SHAPES:
            case = shape.case(scale_down=TINY_SCALE if tiny else 1)
            yield _Layer(case if tokens is None else case.model_copy(update={"num_tokens": tokens}))
        return
    require_unquantised(asked)
    toy = smoke_plan(asked, host=loader.system("cpu_host"), modified=()).recipe if tiny else asked
    case = layer_case_of(toy, num_tokens=tokens).model_copy(update={"name": asked.name})
    yield _Layer(case, layer_differences(asked))


def _changed(
    case: LayerCase,
    routing: str | None,
    precision: Precision | None,
    dispatcher: ExchangeOption,
    *,
    folded: bool,
) -> LayerCase:
    """The case with what was asked for in the place of the recipe's."""
    update: dict[str, object] = {
        "dispatch": case.dispatch.model_copy(update={"dispatcher": dispatcher.value})
    }
    if precision is not None:
        update["precision"] = precision
        update["low_precision"] = case.low_precision if precision == case.precision else None
    case = case.model_copy(update=update)
    if routing is not None:
        case = case.with_routing(_routing(routing))
    return case.folded() if folded else case


def _routing(text: str) -> LayerRouting:
    if text == "balanced":
        return LayerRouting(kind="balanced")
    if text == "random":
        return LayerRouting(kind="random")
    if text.endswith(".json"):
        return traced_routing(Path(text), option="--routing", choices=_ROUTING)
    exponent = re.fullmatch(rf"{_POWER_LAW}([0-9]+(?:\.[0-9]+)?)", text)
    if exponent is None:
        raise BadInputError(f"--routing {text}: unknown; write {_ROUTING}")
    return LayerRouting(kind="power_law", exponent=float(exponent[1]))


def _measured(chosen: _Chosen, system: SystemSpec, root: Path) -> Iterator[tuple[Path, LayerRecord]]:
    """Every layer on every engine that was asked for, each written before the next begins."""
    from functools import partial

    from moe_bench.harness.start import quiet_imports
    from moe_bench.launch.environment import current_environment
    from moe_bench.results.layer_record import write_layer_record

    with quiet_imports():
        from moe_bench.harness.calibrate.sweep import provenance_here
        from moe_bench.harness.layer import bench as harness
        from moe_bench.harness.layer.peers.registry import chosen_engines
    if chosen.peers:
        chosen_engines(system, chosen.peers)  # an unknown name stops here, not at the end
    provenance = provenance_here(
        command=tuple(sys.argv), environment=current_environment(), source_root=data_root()
    )
    tell = partial(typer.echo, err=True)
    told: set[tuple[str, str]] = set()
    with harness.bench_here(system, is_tiny=chosen.is_tiny) as bench:
        for one in chosen.layers:
            asked = harness.Asked(
                differences=one.differences,
                suite=chosen.suite,
                held_for_s=chosen.held_for_s,
                is_graphed=chosen.is_graphed,
                peers=chosen.peers,
            )
            engines = harness.engines_of(
                one.case, system, chosen.experts, all_that_run=chosen.suite is not None
            )
            for engine, obstacle in engines:
                if obstacle is not None:
                    if (engine.name, obstacle) not in told:
                        tell(f"not on {engine.name}: {obstacle}")
                    told.add((engine.name, obstacle))
                    continue
                for case in sweep_of(one.case) if chosen.is_sweep else (one.case,):
                    tell(f"{case.name} on {engine.name}, {case.routing.label}")
                    record = harness.measure_layer(
                        case,
                        engine,
                        bench,
                        provenance,
                        asked,
                        on_progress=tell,
                    )
                    yield write_layer_record(root, record), record


def _show(
    written: Sequence[tuple[Path, LayerRecord]], chosen: _Chosen, system: SystemSpec, *, as_json: bool
) -> None:
    from moe_bench.report.layer_view import layer_json, layer_view, predicted_parts, suite_view, sweep_view

    records = [record for _, record in written]
    if not records:
        raise MissingRequirementError("no engine runs here; the reasons are above, one for each")
    predicted = [predicted_parts(record, system) for record in records]
    if len(records) == 1:
        view = layer_view(records[0], predicted[0])
    else:
        view = sweep_view(records) if chosen.is_sweep else suite_view(records)
    lines = [
        layer_json(record, parts, str(path)) for (path, record), parts in zip(written, predicted, strict=True)
    ]
    print_view(view, lines, as_json)
    if not as_json:
        typer.echo("\n".join(f"written to {path}" for path, _ in written))
