"""Engines side by side in one process: each held against the reference, then timed in turn with the others.

They stand one at a time, so that each has the memory to itself. Rounds go through all of them, every second
one backwards, so that a clock that drifts meets all alike; ratios are taken within a round.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from moe_bench.errors import MoeBenchError
from moe_bench.harness.layer.engine import BuiltLayer, Engine
from moe_bench.harness.layer.inputs import LayerInputs, routed_inputs
from moe_bench.harness.layer.measure import LayerCall, whole_samples
from moe_bench.harness.layer.peers.agreement import (
    ALLOWED_FRACTION,
    differences,
    num_checked_tokens,
    observed,
    reference,
)
from moe_bench.harness.layer.peers.obstacles import PLAIN_PRECISIONS
from moe_bench.harness.layer.weights import LayerWeights, draw_weights
from moe_bench.harness.timing import DeviceClock
from moe_bench.results.layer_peers import EngineResult, EngineTimes, LayerPeers, Outcome, TensorDifference
from moe_bench.results.layer_samples import WholeSamples
from moe_bench.spec.layer_case import LayerCase

NUM_ROUNDS = 3
FAILURES = (
    MoeBenchError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ImportError,
    OSError,
    AssertionError,
)
"""What other people's code raises where it does not run; it ends the engine's part, not the comparison."""


@dataclass(slots=True, kw_only=True)
class _Entrant:
    """What is known of one engine so far."""

    name: str
    engine: Engine
    outcome: Outcome = "measured"
    reason: str | None = None
    implementation: str | None = None
    differences: tuple[TensorDifference, ...] = ()
    rounds: list[WholeSamples] = field(default_factory=list)
    peak_bytes: int | None = None

    def is_out(self, outcome: Outcome, reason: str) -> None:
        """Take no more part in it."""
        self.outcome, self.reason = outcome, reason

    def result(self) -> EngineResult:
        """What the record says of it."""
        times = None
        if self.outcome == "measured":
            times = EngineTimes(rounds=tuple(self.rounds), peak_bytes=self.peak_bytes)
        return EngineResult(
            engine=self.name,
            package=self.engine.package,
            version=_version(self.engine.package),
            outcome=self.outcome,
            reason=self.reason,
            implementation=self.implementation,
            differences=self.differences,
            times=times,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Task:
    """What all engines are given."""

    case: LayerCase
    weights: LayerWeights
    inputs: LayerInputs
    device: str

    @property
    def allowed_fraction(self) -> float:
        """How far an engine may be from the reference."""
        return ALLOWED_FRACTION[self.case.precision]

    def checked_inputs(self) -> tuple[Tensor, Tensor]:
        """Input and output gradient of the tokens that are held against the reference."""
        num_tokens = num_checked_tokens(self.case)
        return self.inputs.x[:num_tokens], self.inputs.gradient[:num_tokens]


def compare_engines(
    asked: LayerCase,
    engines: Mapping[str, Engine],
    *,
    baseline: str,
    device: str,
    clock: DeviceClock,
    num_rounds: int = NUM_ROUNDS,
    on_progress: Callable[[str], None] = lambda text: None,
) -> LayerPeers:
    """Run the layer on each of `engines`, by name, on one rank and in what all of them compute in.

    Times are over those of `baseline`. An engine that is absent, cannot run the case, fails or disagrees with
    the reference is recorded as such, and has no time.
    """
    case, changes = comparable(asked)
    weights = draw_weights(case, device=device)
    task = _Task(case=case, weights=weights, inputs=routed_inputs(case, weights), device=device)
    entrants = [_Entrant(name=name, engine=engine) for name, engine in engines.items()]
    num_checked = _check(task, entrants, on_progress)
    for number in range(num_rounds):
        running = [one for one in entrants if one.outcome == "measured"]
        for entrant in reversed(running) if number % 2 else running:
            on_progress(f"{entrant.name}: round {number + 1} of {num_rounds}")
            _attempt(task, entrant, partial(_time, task, entrant, clock))
    return LayerPeers(
        case=case,
        differences=changes,
        baseline=baseline,
        num_checked_tokens=num_checked,
        allowed_fraction=task.allowed_fraction,
        engines=tuple(entrant.result() for entrant in entrants),
    )


def comparable(asked: LayerCase) -> tuple[LayerCase, tuple[str, ...]]:
    """The layer that other people's engines can compute as well, and what is otherwise in it."""
    case, changes = asked.folded(), []
    if asked.ep_size > 1:
        changes.append(
            f"the {case.moe.num_experts} experts of one of {asked.ep_size} ranks as a layer of their own: "
            f"{case.num_tokens} tokens with {case.moe.top_k} experts each, in the place of "
            f"{asked.num_tokens} with {asked.moe.top_k}"
        )
    if case.precision not in PLAIN_PRECISIONS:
        changes.append(f"precision: bf16, for other engines do not have {case.precision}")
        case = case.model_copy(update={"precision": "bf16", "low_precision": None})
    return case, tuple(changes)


def _check(task: _Task, entrants: list[_Entrant], on_progress: Callable[[str], None]) -> int:
    """Hold every engine that can run against the reference; the number of tokens that it was done with."""
    x, gradient = task.checked_inputs()
    exact: dict[str, Tensor] = {}
    for entrant in entrants:
        if (obstacle := entrant.engine.obstacle(task.case)) is not None:
            entrant.is_out("unable", obstacle)
            continue
        on_progress(f"{entrant.name}: agreement")
        exact = exact or reference(task.case, task.weights, x, gradient)
        _attempt(task, entrant, partial(_agree, task, entrant, exact))
    return len(x)


def _attempt(task: _Task, entrant: _Entrant, use: Callable[[BuiltLayer], None]) -> None:
    """Build the engine's layer and use it; where that fails, the engine is out."""
    try:
        with entrant.engine.build(task.case, task.weights, device=task.device) as layer:
            entrant.implementation = layer.implementation
            use(layer)
    except FAILURES as error:
        first_line = (str(error).splitlines() or [""])[0]
        entrant.is_out("failed", f"{type(error).__name__}: {first_line}")
    if task.device == "cuda":
        torch.cuda.empty_cache()


def _agree(task: _Task, entrant: _Entrant, exact: dict[str, Tensor], layer: BuiltLayer) -> None:
    x, gradient = task.checked_inputs()
    allowed = task.allowed_fraction
    entrant.differences = differences(observed(layer, x, gradient), exact)
    wrong = [one for one in entrant.differences if one.order() > allowed]
    if wrong:
        entrant.is_out("disagrees", ", ".join(map(_in_words, wrong)) + f"; allowed {allowed:.2g}")


def _in_words(difference: TensorDifference) -> str:
    fraction = difference.difference_fraction
    return f"{difference.tensor} is " + (
        "not finite or missing" if fraction is None else f"{fraction:.2g} off"
    )


def _time(task: _Task, entrant: _Entrant, clock: DeviceClock, layer: BuiltLayer) -> None:
    call = LayerCall(layer, task.inputs)
    entrant.rounds.append(whole_samples(call, clock))
    if entrant.peak_bytes is None and task.device == "cuda":
        entrant.peak_bytes = _peak_bytes(call, layer)


def _peak_bytes(call: LayerCall, layer: BuiltLayer) -> int:
    call.drop_gradients()
    before = torch.cuda.memory_allocated() - _held_gradient_bytes(layer)
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - before


def _held_gradient_bytes(layer: BuiltLayer) -> int:
    """Of gradients that kernels add to, and that therefore stand all the time."""
    parameters = () if layer.module is None else layer.module.parameters()
    held = (getattr(parameter, "main_grad", None) for parameter in parameters)
    return sum(gradient.nbytes for gradient in held if gradient is not None)


def _version(package: str) -> str | None:
    """Of an installed distribution; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
