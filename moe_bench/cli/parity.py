"""The verb that says whether two settings of a recipe learn alike: parity."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from moe_bench.cli.app import MODEL, app
from moe_bench.cli.files import picture_to_write
from moe_bench.cli.options import (
    JsonOption,
    NumGpusOption,
    ScaleOption,
    ScaleOptionType,
    SetOption,
    make_console,
    make_loader,
    plan_of,
    print_view,
    rank_here,
    results_root,
)
from moe_bench.cli.parity_ranks import learn_by, starter_by
from moe_bench.errors import BadInputError, MeasurementError, MoeBenchError
from moe_bench.spec.catalogue import data_root, find_recipe, recipe_paths
from moe_bench.spec.rendezvous import Launcher

if TYPE_CHECKING:
    from rich.console import Console

    from moe_bench.harness.training.parity import Learn, Trained
    from moe_bench.results.parity import Evidence, Parity
    from moe_bench.spec.scale import Plan
    from moe_bench.spec.training import TrainingJob

PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        callback=picture_to_write,
        help="Draw losses and differences (.png, .svg, .pdf).",
    ),
]
ComparedArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[BASE [VARIANT]]",
        help="Two recipes, or one with --vary; any number with --plain. <model>, <model>/<run>, a file.",
    ),
]
VaryOption = Annotated[
    list[str] | None,
    typer.Option("--vary", metavar="FIELD=VALUE", help="What the variant changes; all of them together."),
]
PlainOption = Annotated[
    bool,
    typer.Option(
        "--plain",
        help="Hold recipes against their plain settings (one process, nothing fused, overlapped or "
        "recomputed), unless there is such evidence already.",
    ),
]
AgainOption = Annotated[
    bool, typer.Option("--again", help="With --plain: also where there is evidence already.")
]


@app.command(rich_help_panel=MODEL)
def parity(
    data: Annotated[Path, typer.Option("--data", metavar="PREFIX", help="A dataset of `data build`.")],
    recipes: ComparedArgument = None,
    vary: VaryOption = None,
    plain: PlainOption = False,
    is_all: Annotated[bool, typer.Option("--all", help="With --plain: every shipped recipe.")] = False,
    again: AgainOption = False,
    scale: ScaleOptionType = ScaleOption.FULL,
    num_gpus: NumGpusOption = None,
    changes: SetOption = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps of every run.")] = 20,
    repeats: Annotated[
        int, typer.Option("--repeats", min=2, help="Runs of the base from weights a rounding off.")
    ] = 4,
    launcher: Annotated[
        Launcher | None,
        typer.Option("--launcher", help="What starts the ranks of every run; without a GPU they are forked."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder to write to; default: results/.")] = None,
    plot: PlotOption = None,
    as_json: JsonOption = False,
) -> None:
    """Test whether two settings of a recipe learn alike: losses step by step, against rounding."""
    session = _Session(
        data=data,
        num_steps=steps,
        num_repeats=repeats,
        scale=scale,
        num_gpus=num_gpus,
        changes=tuple(changes or ()),
        root=out or results_root(),
        launcher=launcher,
    )
    if rank_here() is not None:
        raise BadInputError(
            "parity starts the ranks of its runs itself: call it once, without torchrun or srun"
        )
    if not plain:
        if is_all or again:
            raise BadInputError("parity: --all and --again are of --plain; add it or drop them")
        _two(session, recipes or (), vary or (), plot, as_json)
        return
    if vary:
        raise BadInputError("parity: --plain says what is compared; drop --vary, or drop --plain")
    if scale is not ScaleOption.SMOKE:
        raise BadInputError("parity: --plain trains toys on this machine; add --scale smoke")
    if bool(recipes) == is_all:
        raise BadInputError("parity: which recipes? name some, or --all for every shipped one")
    if plot is not None and (is_all or len(recipes or ()) > 1):
        raise BadInputError("parity: --plot draws one recipe; name one, or drop it")
    _plain(session, recipes or _shipped(), plot, is_all=is_all, again=again, as_json=as_json)


@dataclass(frozen=True, kw_only=True)
class _Session:
    """What was typed that holds for every comparison."""

    data: Path
    num_steps: int
    num_repeats: int
    scale: ScaleOption
    num_gpus: int | None
    changes: tuple[str, ...]
    root: Path
    launcher: Launcher | None

    @cached_property
    def trained(self) -> Trained:
        from moe_bench.harness.start import quiet_imports

        with quiet_imports():
            from moe_bench.harness.training.parity import Trained
        return Trained()

    def learn(self, *plans: Plan) -> Learn:
        """What starts the ranks of `plans`: forks, or a launcher that has room for them."""
        from moe_bench.harness.mcore_config import megatron_arguments
        from moe_bench.harness.requirements import require_runnable
        from moe_bench.harness.start import quiet_imports
        from moe_bench.launch.environment import current_environment
        from moe_bench.launch.ranks import launcher_for

        launcher = self.launcher or launcher_for(plans, current_environment())
        if launcher is None:
            with quiet_imports():
                from moe_bench.harness.training.parity import learn_here
            return learn_here
        starter = starter_by(launcher)
        for plan in plans:
            starter.require_room(plan)
            if launcher == "torchrun":  # srun's ranks may run in an image
                require_runnable(megatron_arguments(plan.recipe))
        return learn_by(starter, self.root)

    @cached_property
    def console(self) -> Console:
        return make_console(stderr=True)

    def plan(self, recipe: str, vary: Sequence[str] = ()) -> Plan:
        changes = [*self.changes, *vary]
        return plan_of(recipe, scale=self.scale, num_gpus=self.num_gpus, changes=changes)

    def job(self, plan: Plan) -> TrainingJob:
        from moe_bench.spec.derive_training import Wishes, training_job

        steps = self.num_steps
        wishes = Wishes(
            data=str(self.data),
            num_steps=steps,
            validate_every=steps,
            num_validation_batches=1,
            save_every=steps,
        )
        return training_job(plan, wishes, before=None)

    def compare(self, base: Plan, variant: Plan) -> tuple[Path, Parity]:
        """The comparison of both, and the file that it was written to."""
        from moe_bench.harness.start import quiet_imports
        from moe_bench.launch.environment import current_environment
        from moe_bench.results.parity import write_parity
        from moe_bench.spec.derive_parity import changes_between, require_comparable, watched_plan

        jobs = self.job(watched_plan(base)), self.job(watched_plan(variant))
        for job in jobs:
            require_comparable(job.plan)  # refused before anything is loaded
        with quiet_imports():
            from moe_bench.harness.training.parity import ParityCase, compare_losses
        case = ParityCase(
            base=jobs[0],
            variant=jobs[1],
            varied=changes_between(*(job.plan.recipe for job in jobs)),
            num_repeats=self.num_repeats,
        )
        found = compare_losses(
            case,
            environment=current_environment(),
            command=("moe-bench", *sys.argv[1:]),
            source_root=data_root(),
            trained=self.trained,
            learn=self.learn(*(job.plan for job in jobs)),
            on_run=lambda name: self.console.print(
                f"{base.asked}, {variant.recipe.precision}: {name}", highlight=False
            ),
        )
        return write_parity(self.root, found), found


def _two(
    session: _Session, recipes: Sequence[str], vary: Sequence[str], plot: Path | None, as_json: bool
) -> None:
    """One comparison: of a recipe with what `vary` makes of it, or of two recipes of one model."""
    if len(recipes) not in (1, 2) or (len(recipes) == 1 and not vary):
        raise BadInputError("parity: what is compared? name two recipes, or one with --vary or --plain")
    from moe_bench.spec.fields import full_change

    base, variant = session.plan(recipes[0]), session.plan(recipes[-1], [*map(full_change, vary)])
    from moe_bench.report.parity_plot import write_parity_plot
    from moe_bench.report.parity_view import parity_json, parity_view, verdict_text
    from moe_bench.spec.derive_parity import require_same_model

    if len(recipes) == 2:
        require_same_model(base, variant)
    path, found = session.compare(base, variant)
    if plot is not None:
        write_parity_plot((found,), plot)
    print_view(parity_view(found, path), parity_json(found, path), as_json)
    if not found.is_equal:
        raise MeasurementError(f"{found.base.plan.asked}: {verdict_text(found)}")


def _shipped() -> list[str]:
    """Every shipped recipe, first the default run of each model: its evidence is worth most."""
    loader = make_loader()
    names = [f"{path.parent.name}/{path.stem}" for path in recipe_paths(loader.root)]
    return sorted(
        names, key=lambda name: name.partition("/")[2] != loader.default_run(name.partition("/")[0])
    )


def _plain(
    session: _Session,
    recipes: Sequence[str],
    plot: Path | None,
    *,
    is_all: bool,
    again: bool,
    as_json: bool,
) -> None:
    """Hold recipes against their plain settings; of all, one that cannot be does not stop the others."""
    from moe_bench.report.parity_plot import write_parity_plot
    from moe_bench.report.parity_view import evidence_json, evidence_view
    from moe_bench.spec.derive_parity import require_causal

    found: dict[str, Evidence] = {}
    skipped: dict[str, str] = {}
    failed: list[str] = []
    seen: list[object] = []
    for recipe in recipes:
        plan = session.plan(recipe)
        try:
            require_causal(plan.recipe)
        except BadInputError as error:
            if not is_all:
                raise
            skipped[plan.asked] = str(error).removeprefix(f"{plan.recipe.name}: ")
            continue
        try:
            found[plan.asked] = _evidence(session, recipe, plan, seen=seen if again else None)
        except MoeBenchError as error:
            if not is_all:
                raise
            failed.append(f"{plan.asked}: {str(error).partition('\n')[0]}")
    if plot is not None:
        write_parity_plot(next(iter(found.values())).comparisons, plot)
    print_view(evidence_view(found, skipped), evidence_json(found, skipped), as_json)
    different = [name for name, evidence in found.items() if evidence.verdict == "differs"]
    if different:
        raise MeasurementError(
            f"{', '.join(different)}: does not learn like the plain setting; see its record"
        )
    if failed:
        raise MeasurementError("\n".join(failed))


def _evidence(session: _Session, recipe: str, plan: Plan, *, seen: list[object] | None) -> Evidence:
    """What there is for `plan`, and what comparing now adds to it.

    With `seen` only what was compared since counts: the settings in it, to which this one's are added.
    """
    from moe_bench.results.parity import evidence_of, read_parities
    from moe_bench.spec.check import require_legal
    from moe_bench.spec.derive_parity import fp32_plan, plain_plan, settings_of_toy

    loader, models = make_loader(), [plan.recipe.model.key]
    path = find_recipe(recipe, loader)
    evidence = evidence_of(read_parities(session.root, models=models), plan)
    done = [] if evidence is None else [parity.settings for parity in evidence.comparisons]
    if seen is not None:
        done = [settings for settings in done if settings in seen]
    for variant in (fp32_plan(plan), plan):
        settings = settings_of_toy(variant.recipe)
        if settings not in done:
            base = require_legal(plain_plan(variant), path, loader)
            session.compare(base, require_legal(variant, path, loader))
            done.append(settings)
    if seen is not None:
        seen += done
    evidence = evidence_of(read_parities(session.root, models=models), plan)
    if evidence is None:
        raise RuntimeError(f"{plan.asked}: what was written is not found again")
    return evidence
