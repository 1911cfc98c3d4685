"""Everything that is said of one recipe before it runs: its step, interval, memory, load and assumptions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from moe_bench.analysis.memory import MemoryFit, memory_fit
from moe_bench.projection.constants import Constants
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.evidence.calibrated_constants import constants_for
from moe_bench.projection.interval import Interval, has_sparse_attention, interval, rates_are_prior
from moe_bench.projection.schedule.memory import schedule_memory
from moe_bench.projection.schedule.simulation import ScheduleKind
from moe_bench.projection.step import Projection, Term, project
from moe_bench.projection.work.load_choice import LoadChoice, load_choice
from moe_bench.results.calibration import Calibration
from moe_bench.spec.recipe import Offload, Recipe
from moe_bench.spec.system import SystemSpec

_NUM_LIMITS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Basis:
    """What a forecast rests on beside the laws: constants, measurements of this GPU, tables."""

    constants: Constants = field(default_factory=Constants)
    calibrations: tuple[Calibration, ...] = ()
    """Files of results/calibration; none for a projection that is the same on every machine."""
    uses_tables: bool = False
    """Whether `aiconfigurator-core` is asked, too."""

    def efficiency(self, system: SystemSpec) -> Efficiency:
        """Rates of the GPU of `system`; files of other GPUs are passed over.

        Raises BadInputError for a system without a GPU, MissingRequirementError without the tables.
        """
        name = None if system.gpu is None else system.gpu.device_name
        own = [one for one in self.calibrations if one.is_evidence and one.provenance.gpu.name == name]
        return Efficiency(system, own, tables=self.uses_tables)

    def calibrated(self, system: SystemSpec) -> Basis:
        """The same with the constants that its calibrations determine."""
        return replace(self, constants=constants_for(system, self.calibrations, self.constants).constants)


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
    recipe: Recipe,
    *,
    basis: Basis | None = None,
    load: str | None = None,
    schedule: ScheduleKind | None = None,
) -> Forecast:
    """`recipe` before it runs; `load` as in `load_choice`, `schedule` as in `step_work`.

    Raises BadInputError for a system without a GPU, a precision without rates, an unknown load, or a schedule
    that the recipe's pipeline cannot have.
    """
    basis = Basis() if basis is None else basis
    chosen = load_choice(recipe, load)
    if schedule is None:
        memory = memory_fit(recipe, load=chosen.busiest_over_mean_ratio)
    else:
        memory = schedule_memory(recipe, schedule, load=chosen.busiest_over_mean_ratio)
    efficiency = basis.efficiency(recipe.system)
    projection = project(
        recipe,
        constants=basis.constants,
        efficiency=efficiency,
        load=chosen.busiest_over_mean_ratio,
        schedule=schedule,
    )
    return Forecast(
        projection=projection,
        interval=interval(recipe, projection.step_s),
        memory=memory,
        load=chosen,
        assumptions=(*_assumptions(projection, chosen, schedule), *_own_evidence(basis, recipe, efficiency)),
    )


UNCOUNTED_OFFLOAD = (
    "what is offloaded leaves the GPU's memory, and its way to the host and back is not counted"
)


def has_uncounted_offload(recipe: Recipe) -> bool:
    """Whether more than whole layers' activations is offloaded, whose copies alone are counted."""
    return recipe.offload.model_copy(update={"num_activation_layers": 0}) != Offload()


def _assumptions(projection: Projection, load: LoadChoice, schedule: ScheduleKind | None) -> Iterable[str]:
    """What the numbers rest on, in words."""
    recipe = projection.recipe
    yield "a published run of the same software is the measure; yours may lack its kernels and its tuning"
    if rates_are_prior(recipe):
        yield f"no public measurement of {recipe.system.display_name}: rates scaled by the datasheets' peaks"
    if recipe.kernels.family == "quack" and recipe.model.moe is not None:
        yield "no public step with quack's experts: priced at the rates of other grouped products"
    if has_sparse_attention(recipe):
        yield "rates of sparse attention are priors: the best that its kernels reached alone"
    if recipe.model.moe is not None:
        yield f"the busiest expert-parallel rank receives {load.busiest_over_mean_ratio:.2f} times the mean"
    if recipe.parallel.num_gpus > recipe.system.nvlink_domain_gpus:
        yield _fabric_assumption(recipe.system)
    if projection.timeline is not None and projection.timeline.shape.kind is not ScheduleKind.NO_PIPELINE:
        yield "every micro batch takes the same time; the pipeline is simulated, not its noise"
    if schedule is not None:
        yield (
            f"{schedule.label} in the place of Megatron-Core's schedule, activations kept until their weight "
            "gradient"
        )
    if has_uncounted_offload(recipe):
        yield UNCOUNTED_OFFLOAD
    if recipe.routing.mode == "natural":
        yield "experts are as unequal as a balancing loss leaves them on real text"


def _fabric_assumption(system: SystemSpec) -> str:
    fabric = system.fabric
    if fabric is None:
        return "jobs are placed without gaps on a network of unknown tiers, which costs what its cards cost"
    ratios = fabric.leaf_oversubscription_ratio, fabric.spine_oversubscription_ratio
    if max(ratios) == 1:
        return "jobs are placed without gaps on a fabric that is not oversubscribed"
    leaf, spine = ratios
    return (
        f"jobs are placed without gaps; links upwards are oversubscribed {leaf:g} (leaf), {spine:g} (spine)"
    )


def _own_evidence(basis: Basis, recipe: Recipe, efficiency: Efficiency) -> Iterable[str]:
    """Which constants were measured on this GPU, and what was asked of measurements in vain."""
    measured = constants_for(recipe.system, basis.calibrations, basis.constants).sources
    if measured:
        yield f"measured on this GPU: {', '.join(f'{name} ({what})' for name, what in measured.items())}"
    missed = {f"{one.kind} ({one.reason})" for one in efficiency.unanswered}
    if missed:
        yield f"answered by law for want of a measurement: {'; '.join(sorted(missed))}"
