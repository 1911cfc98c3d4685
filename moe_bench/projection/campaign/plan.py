"""How long each measurement of a campaign takes and how much memory, before any of it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import get_args

from moe_bench.errors import BadInputError
from moe_bench.projection.calibration.plan import CalibrationPlan
from moe_bench.projection.campaign.wishes import (
    CalibrateWish,
    Kind,
    LayerWish,
    SliceWish,
    TestsWish,
    Wish,
    wishes,
)
from moe_bench.projection.isolated_layer import isolated_parts
from moe_bench.projection.slice_step import START_S, slice_estimate
from moe_bench.results.campaign import Step
from moe_bench.spec.derive_layer import layer_recipe
from moe_bench.spec.layer_case import LayerCase
from moe_bench.spec.scale import Plan
from moe_bench.spec.system import SystemSpec

KINDS: tuple[Kind, ...] = get_args(Kind)
_PACKAGES = {
    "transformer_engine": "transformer_engine",
    "quack": "quack",
}
"""Modules that a family of kernels needs beside torch and Megatron-Core."""
_TESTS_S = 150.0
_TEST_WORKERS = ("-n", "4", "--dist", "loadgroup")
"""Most of their time goes into torch.compile and into starting commands, on the host."""
_TINY_START_S = 15.0
"""Imports on any machine."""
_LAYER_PASSES = 120
"""Forward and backward passes that one engine's whole and parts take, warm-up and a cold cache included."""
_PEER_PASSES = 400
"""Of the loops over experts, which are slower by their number of launches: in passes of a grouped engine."""
_SWEEP_CASES = 6
_ENGINES_OF_SUITE = 3
_PROFILE_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """What the estimates are made of, derived where recipes are loaded."""

    slice_of: Callable[[SliceWish], Plan]
    layers_of: Callable[[LayerWish], Sequence[LayerCase]]
    calibration_of: Callable[[CalibrateWish], CalibrationPlan]
    installed: Callable[[str], bool]
    """Whether a module can be imported here."""
    has_tests: bool
    """Whether the repository's tests are here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedStep:
    """One measurement to be made."""

    step: Step
    estimated_s: float
    memory_bytes: int | None
    """On the device; None where nobody knows."""
    absent: str | None
    """What it needs and this machine lacks; it then takes no time."""

    @property
    def due_s(self) -> float:
        """Of the campaign's time."""
        return 0.0 if self.absent else self.estimated_s


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignPlan:
    """Measurements, the most valuable first, and those that the budget has no room for."""

    system: SystemSpec
    is_tiny: bool
    steps: tuple[PlannedStep, ...]
    over_budget: tuple[PlannedStep, ...]

    @property
    def estimated_s(self) -> float:
        """All steps within the budget, one after the other."""
        return sum(one.due_s for one in self.steps)


def campaign_plan(
    system: SystemSpec, sources: Sources, *, only: Collection[str] | None, is_tiny: bool, budget_s: float
) -> CampaignPlan:
    """All measurements of the kinds `only`, None for all, on the GPU of `system`.

    Raises BadInputError for an unknown kind.
    """
    unknown = set(only or ()) - set(KINDS)
    if unknown:
        raise BadInputError(f"--only {','.join(sorted(unknown))}: unknown; choose from {','.join(KINDS)}")
    planner = _Planner(system=system, sources=sources, is_tiny=is_tiny)
    planned = [planner.planned(wish) for wish in wishes(is_tiny=is_tiny) if only is None or wish.kind in only]
    kept: list[PlannedStep] = []
    left: list[PlannedStep] = []
    spent_s = 0.0
    for one in planned:
        fits = spent_s + one.due_s <= budget_s
        (kept if fits else left).append(one)
        spent_s += one.due_s if fits else 0.0
    return CampaignPlan(system=system, is_tiny=is_tiny, steps=tuple(kept), over_budget=tuple(left))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Planner:
    system: SystemSpec
    sources: Sources
    is_tiny: bool

    def planned(self, wish: Wish) -> PlannedStep:
        """The command of `wish`, and what it costs."""
        what = wish.what
        seconds, num_bytes = self._estimate(what)
        step = Step(
            key=wish.key,
            question=wish.question,
            program="pytest" if isinstance(what, TestsWish) else "moe-bench",
            arguments=_arguments(what, is_tiny=self.is_tiny),
        )
        return PlannedStep(step=step, estimated_s=seconds, memory_bytes=num_bytes, absent=self._absent(what))

    def _absent(self, what: TestsWish | CalibrateWish | SliceWish | LayerWish) -> str | None:
        if isinstance(what, TestsWish):
            return None if self.sources.has_tests else "the repository's tests are not here; use a checkout"
        if isinstance(what, SliceWish) and what.kernels in _PACKAGES:
            if self.is_tiny:
                return f"{what.kernels} needs a GPU"
            if not self.sources.installed(_PACKAGES[what.kernels]):
                return f"{what.kernels} is not installed"
        return None

    def _estimate(self, what: TestsWish | CalibrateWish | SliceWish | LayerWish) -> tuple[float, int | None]:
        """Seconds, and bytes on the device."""
        match what:
            case TestsWish():
                return (_TINY_START_S if self.is_tiny else _TESTS_S), None
            case CalibrateWish():
                plan = self.sources.calibration_of(what)
                memory = max(one.memory_bytes for one in plan.tasks)
                return self._start_s + plan.estimated_s, memory
            case SliceWish():
                if self.is_tiny:
                    return 2 * self._start_s, None
                seconds, memory = slice_estimate(self.sources.slice_of(what))
                return seconds + (_PROFILE_S if what.profile else 0.0), memory
            case LayerWish():
                return self._layer_estimate(what)

    def _layer_estimate(self, what: LayerWish) -> tuple[float, int | None]:
        cases = self.sources.layers_of(what)
        if self.is_tiny:
            return 2 * self._start_s, None
        passes = _LAYER_PASSES * (_SWEEP_CASES if what.is_sweep else 1)
        passes += _PEER_PASSES if what.has_peers else 0
        num_engines = len(what.experts) or _ENGINES_OF_SUITE
        seconds = sum(
            num_engines * passes * sum(isolated_parts(layer_recipe(case, self.system), load=1.0).values())
            for case in cases
        )
        return self._start_s + seconds + (what.held_s or 0.0), max(map(_layer_bytes, cases))

    @property
    def _start_s(self) -> float:
        return _TINY_START_S if self.is_tiny else START_S


def _layer_bytes(case: LayerCase) -> int:
    """Weights, their gradients in BF16 and FP32, and every row before and behind both products, twice.

    Rows stand in BF16 forward and backward: hidden in and out, gate and linear part, and what they make.
    """
    hidden, ffn = case.hidden_size, case.moe.expert_ffn_hidden_size
    weights = case.num_local_experts * 3 * hidden * ffn
    rows = case.num_rows * (2 * hidden + 3 * ffn)
    return weights * (2 + 2 + 4) + 2 * rows * 2


def _arguments(what: TestsWish | CalibrateWish | SliceWish | LayerWish, *, is_tiny: bool) -> tuple[str, ...]:
    """What follows the program's name; `--out` is added where it runs."""
    match what:
        case TestsWish():
            # one file where no GPU would run the rest
            where = (f"{what.folder}/kernels/test_norm.py",) if is_tiny else (*_TEST_WORKERS, what.folder)
            # what torch warns of on a GPU that nobody has tried says nothing about a kernel
            return ("-m", "gpu", "-q", "-W", "default", *where)
        case CalibrateWish():
            only = ("--only", ",".join(what.only)) if what.only else ()
            return ("calibrate", *only, "--budget-seconds", f"{what.budget_s:g}", *_tiny(is_tiny))
        case SliceWish():
            return _slice_arguments(what, is_tiny=is_tiny)
        case LayerWish():
            return _layer_arguments(what, is_tiny=is_tiny)


def _tiny(is_tiny: bool) -> tuple[str, ...]:
    return ("--tiny",) if is_tiny else ()


def _slice_arguments(what: SliceWish, *, is_tiny: bool) -> tuple[str, ...]:
    scale = ("tiny_slice",) if is_tiny else ("slice", "--kernels", what.kernels)
    changes = () if is_tiny else tuple(word for change in what.changes for word in ("--set", change))
    repeat = ("--repeat", str(what.repeat)) if what.repeat else ()
    profile = ("--profile", what.profile) if what.profile else ()
    return ("run", what.recipe, "--scale", *scale, *changes, *repeat, *profile)


def _layer_arguments(what: LayerWish, *, is_tiny: bool) -> tuple[str, ...]:
    named = ("--suite", "sonicmoe") if what.recipe is None else (what.recipe,)
    experts = tuple(word for name in what.experts for word in ("--experts", name))
    peers = ("--peers", "all") if what.has_peers else ()
    sweep = ("--sweep",) if what.is_sweep else ()
    held_s = 1.0 if is_tiny and what.held_s else what.held_s
    held = ("--held-seconds", f"{held_s:g}") if held_s else ()
    graph = ("--folded", "--graph") if what.is_graphed and not is_tiny else ()
    return ("layer", *named, *experts, *peers, *sweep, *held, *graph, *_tiny(is_tiny))
