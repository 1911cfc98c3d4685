"""What a calibration measures and in which order: constants first, then shapes by the time they stand for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from moe_bench.errors import BadInputError
from moe_bench.projection.calibration.grid import constant_shapes, grid_shapes
from moe_bench.projection.calibration.shapes import Shape, recipe_shapes
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.evidence.calibrated_shapes import operations_of
from moe_bench.projection.evidence.rates import STREAM_HBM_FRACTION
from moe_bench.projection.work.lowering import lower
from moe_bench.results import calibration as measured
from moe_bench.results.calibration import Task
from moe_bench.results.calibration_tasks import (
    BURST_S,
    COMPILED,
    DEVICE_TO_HOST,
    FLUSH_BYTES,
    HOST_TO_DEVICE,
    LAUNCHED_LAYERS,
    NUM_BURSTS,
    NUM_WARMUP,
    PAUSE_S,
    OperationName,
    implementations_of,
    memory_bytes,
    num_samples,
)
from moe_bench.spec.recipe import Recipe
from moe_bench.spec.system import GpuSpec, SystemSpec

CONSTANT = "a constant"
GRID = "grid"

_SETUP_S = 0.1
"""Of one measurement: making inputs, loading a kernel, and the answer of the driver about its clocks."""
_COMPILE_S = 20.0
_LAYER_FRACTION = 0.5
"""Of the BF16 peak, a MoE layer without communication."""
_HOST_BYTES_PER_S = 50e9
"""PCIe 5.0 x16, of 63 GB/s each way."""
_LAUNCH_S = 25e-6
_HOST_FLOPS_PER_S, _HOST_MEMORY_BYTES_PER_S = 5e9, 1e9
_HOST_START_S = 1e-5
"""For toy shapes on any machine: one core with slow BF16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTask:
    """One measurement to be made."""

    task: Task
    call_s: float
    """One call, by the projection's law."""
    estimated_s: float
    """All of the measurement."""
    memory_bytes: int
    time_fraction: float
    """Of the time of all measurable operations of the recipes, averaged over them; 0 in the grid."""
    origin: str
    """The recipe that gives it most time, `grid`, or `a constant`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationPlan:
    """Measurements, the most valuable first, and what was left out of them."""

    system: SystemSpec
    """Its GPU's law gave the estimates."""
    is_tiny: bool
    tasks: tuple[PlannedTask, ...]
    too_large: tuple[PlannedTask, ...]
    """Those that do not fit into the memory of the GPU."""
    over_budget: tuple[PlannedTask, ...]
    """Those that `--budget-seconds` has no room for."""
    unprojected: tuple[str, ...]
    """Recipes whose operations are not known."""

    @property
    def estimated_s(self) -> float:
        """All measurements, one after the other."""
        return sum(one.estimated_s for one in self.tasks)


def calibration_plan(
    recipes: Sequence[Recipe],
    system: SystemSpec,
    *,
    launching: Recipe,
    only: Collection[OperationName],
    installed: Callable[[str], bool],
    is_tiny: bool = False,
    budget_s: float | None = None,
) -> CalibrationPlan:
    """All measurements of `only` for the shapes of `recipes` on the GPU of `system`.

    `launching` is the toy whose layers are launched. `installed` says whether a package is here; what is
    missing is planned all the same, to be named in the file, but takes no time.
    Raises BadInputError where nothing is left to measure.
    """
    efficiency, gpu = Efficiency(system), system.gpu
    if gpu is None:
        raise BadInputError(f"{system.key}: gpu: null, so nothing can be estimated; name another system")
    shapes, unprojected = _weighed(recipes, efficiency)
    constants = [_launches(launching), *constant_shapes(is_tiny=is_tiny)]
    found: dict[Shape, tuple[float, str]] = dict.fromkeys(constants, (0.0, CONSTANT))
    for shape, weight in sorted(shapes.items(), key=lambda item: -item[1][0]):
        found.setdefault(shape, weight)
    if not is_tiny:
        for shape in grid_shapes():
            found.setdefault(shape, (0.0, GRID))
    estimator = _Estimator(efficiency=efficiency, gpu=gpu, is_tiny=is_tiny)
    planned = [
        estimator.planned(
            Task(what=what, dtype=dtype, implementation=implementation),
            weight,
            is_here=implementation.package is None or installed(implementation.package),
        )
        for (what, dtype), weight in found.items()
        if what.operation in only
        for implementation in implementations_of(what, dtype)
    ]
    fitting = [one for one in planned if one.memory_bytes <= gpu.usable_bytes]
    kept, left = _within(fitting, budget_s)
    if not kept:
        raise BadInputError("nothing to measure: name more operations behind --only, or a larger budget")
    return CalibrationPlan(
        system=system,
        is_tiny=is_tiny,
        tasks=tuple(kept),
        too_large=tuple(one for one in planned if one.memory_bytes > gpu.usable_bytes),
        over_budget=tuple(left),
        unprojected=unprojected,
    )


def _within(
    planned: Sequence[PlannedTask], budget_s: float | None
) -> tuple[list[PlannedTask], list[PlannedTask]]:
    """Those that there is time for, in their order, and the others."""
    kept: list[PlannedTask] = []
    left: list[PlannedTask] = []
    spent_s = 0.0
    for one in planned:
        if budget_s is None or spent_s + one.estimated_s <= budget_s:
            kept.append(one)
            spent_s += one.estimated_s
        else:
            left.append(one)
    return kept, left


def _launches(toy: Recipe) -> Shape:
    """Layers with experts, as often as the projection thinks that each starts a kernel."""
    lowered = lower(toy)
    per_layer = max(work.num_launches for work in lowered.kinds.values())
    num_kernels = round(LAUNCHED_LAYERS * per_layer)
    return measured.Launch(operation="launch", num_kernels=num_kernels, layers_of=toy.model.key), "bf16"


def _weighed(
    recipes: Sequence[Recipe], efficiency: Efficiency
) -> tuple[dict[Shape, tuple[float, str]], tuple[str, ...]]:
    """Every shape with its mean share of time and the recipe where that is largest."""
    shares: dict[Shape, dict[str, float]] = defaultdict(dict)
    unprojected = []
    for recipe in recipes:
        try:
            own = recipe_shapes(recipe, efficiency)
        except BadInputError:
            unprojected.append(recipe.name)
            continue
        for shape, share in own.items():
            shares[shape][recipe.name] = share
    number = max(1, len(recipes) - len(unprojected))
    weighed = {
        shape: (sum(own.values()) / number, max(own, key=lambda name: own[name]))
        for shape, own in shares.items()
    }
    return weighed, tuple(unprojected)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Estimator:
    """Seconds of one measurement."""

    efficiency: Efficiency
    gpu: GpuSpec
    is_tiny: bool

    def call_s(self, task: Task) -> float:
        """One call by the projection's law; streams, launches and whole layers by their work."""
        what = task.what.work if isinstance(task.what, measured.Sustained) else task.what
        if isinstance(what, measured.Launch):
            return _LAUNCH_S * what.num_kernels
        if self.is_tiny:
            flops_s = what.num_flops / _HOST_FLOPS_PER_S
            return _HOST_START_S + flops_s + what.num_bytes(task.dtype) / _HOST_MEMORY_BYTES_PER_S
        if isinstance(what, measured.MoeLayer):
            return what.num_flops / (_LAYER_FRACTION * self.gpu.bf16_flops_per_s)
        known = next(operations_of(task.model_copy(update={"what": what})), None)
        if known is not None:
            return self.efficiency.law_s(known)
        if isinstance(what, measured.MemoryBound) and what.variant in (HOST_TO_DEVICE, DEVICE_TO_HOST):
            return what.num_read_bytes / _HOST_BYTES_PER_S
        return self.stream_s(what.num_bytes(task.dtype))

    def stream_s(self, num_bytes: int) -> float:
        """A large plain kernel."""
        return num_bytes / (STREAM_HBM_FRACTION * self.gpu.hbm_bytes_per_s)

    def measurement_s(self, task: Task, call_s: float) -> float:
        """Inputs, warm-up and samples with the flush before each; what is held, and bursts, as they are."""
        what = task.what
        if isinstance(what, measured.Sustained):
            bursts_s = 0.0 if self.is_tiny else NUM_BURSTS * (PAUSE_S + BURST_S)
            return _SETUP_S + (what.held_s or bursts_s)
        compile_s = _COMPILE_S if task.implementation in COMPILED and not self.is_tiny else 0.0
        sample_s = call_s + (0.0 if self.is_tiny else self.stream_s(FLUSH_BYTES))
        setup_s = _SETUP_S / 10 if self.is_tiny else _SETUP_S
        return setup_s + compile_s + (NUM_WARMUP + num_samples(sample_s)) * sample_s

    def planned(self, task: Task, weight: tuple[float, str], *, is_here: bool) -> PlannedTask:
        """`task` with what it costs; nothing, where its package is not here."""
        call_s = self.call_s(task)
        return PlannedTask(
            task=task,
            call_s=call_s,
            estimated_s=self.measurement_s(task, call_s) if is_here else 0.0,
            memory_bytes=memory_bytes(task),
            time_fraction=weight[0],
            origin=weight[1],
        )
