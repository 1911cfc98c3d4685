"""Everything that is said of one recipe before it runs: its step, interval, memory, load and assumptions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from moe_bench.analysis.memory import MemoryFit, memory_fit
from moe_bench.projection.constants import Constants
from moe_bench.projection.interval import Interval, interval, rates_are_prior
from moe_bench.projection.load_choice import LoadChoice, load_choice
from moe_bench.projection.projected import Projection, Term, project
from moe_bench.projection.schedule import ScheduleKind
from moe_bench.projection.traits import MEGATRON, Traits
from moe_bench.spec.recipe import Recipe

_NUM_LIMITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """One recipe, projected."""

    projection: Projection
    interval: Interval
    memory: MemoryFit
    load: LoadChoice
    assumptions: tuple[str, ...]

    @property
    def recipe(self) -> Recipe:
        """The recipe it is about."""
        return self.projection.recipe

    @property
    def limits(self) -> tuple[Term, ...]:
        """The largest terms of the step, largest first."""
        ordered = sorted(self.projection.terms, key=lambda term: term.seconds, reverse=True)
        return tuple(ordered[:_NUM_LIMITS])


def forecast(
    recipe: Recipe, *, constants: Constants | None = None, load: str | None = None, traits: Traits = MEGATRON
) -> Forecast:
    """`recipe` before it runs; `load` as in `load_choice`.

    Raises BadInputError for a system without a GPU, a precision without rates, or an unknown load.
    """
    memory = memory_fit(recipe)
    chosen = load_choice(recipe, load)
    projection = project(recipe, constants=constants, load=chosen.busiest_over_mean_ratio, traits=traits)
    return Forecast(
        projection=projection,
        interval=interval(recipe, projection.step_s),
        memory=memory,
        load=chosen,
        assumptions=tuple(_assumptions(projection, chosen)),
    )


def _assumptions(projection: Projection, load: LoadChoice) -> Iterable[str]:
    """What the numbers rest on, in words."""
    recipe = projection.recipe
    yield "a published run of the same software is the measure; yours may lack its kernels and its tuning"
    if rates_are_prior(recipe):
        yield f"no public measurement of {recipe.system.display_name}: rates scaled by the datasheets' peaks"
    if recipe.model.moe is not None:
        yield f"the busiest expert-parallel rank receives {load.busiest_over_mean_ratio:.2f} times the mean"
    if recipe.parallel.num_gpus > recipe.system.nvlink_domain_gpus:
        yield "jobs are placed without gaps on a fabric that is not oversubscribed"
    if projection.timeline is not None and projection.timeline.shape.kind is not ScheduleKind.NO_PIPELINE:
        yield "every micro batch takes the same time; the pipeline is simulated, not its noise"
    if recipe.routing.mode == "natural":
        yield "experts are as unequal as a balancing loss leaves them on real text"
