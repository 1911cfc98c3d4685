"""Times one built layer: whole, with its parts marked, in a burst and held."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer

from moe_bench.harness.kernels.graphed_layer import captured
from moe_bench.harness.layer.engine import BuiltLayer
from moe_bench.harness.layer.inputs import LayerInputs
from moe_bench.harness.layer.parts import PartClock
from moe_bench.harness.ranges import heard_by
from moe_bench.harness.timing import DeviceClock, burst_samples_s, held_samples_s
from moe_bench.results.calibration_tasks import NUM_WARMUP, PAUSE_S, WINDOW_S, num_samples
from moe_bench.results.layer_record import HeldSamples, PartSamples, Pass
from moe_bench.results.layer_samples import WholeSamples

_TINY_PAUSE_S, _TINY_WINDOW_S = 0.01, 0.05


@dataclass(frozen=True, slots=True)
class LayerCall:
    """Forward and backward of one layer on the inputs of a case, which is what a micro batch does with it."""

    built: BuiltLayer
    inputs: LayerInputs

    def __call__(self) -> None:
        """Both passes; the gradients of the call before are dropped."""
        self.drop_gradients()
        self.passes(lambda: None)

    def drop_gradients(self) -> None:
        """Between two micro batches: gradients that a kernel adds up stay, as in training."""
        if self.built.module is None:
            self.built.clear_gradients()
            return
        for parameter in self.built.module.parameters():
            parameter.grad = None

    def passes(self, between: Callable[[], Any]) -> Any:
        """Both passes; what `between` returns, which is called between them."""
        x = self.inputs.x.detach().requires_grad_()
        y = self.built.forward(x)
        middle = between()
        y.backward(self.inputs.gradient)
        return middle


def whole_samples(call: LayerCall, clock: DeviceClock) -> WholeSamples:
    """As many calls as their length asks for, each with a cold L2, after a warm-up."""
    probe = [_timed(call, clock) for _ in range(NUM_WARMUP)][-1]
    return _samples([_timed(call, clock) for _ in range(_num_calls(probe, clock))], clock)


def marked_samples(
    call: LayerCall, clock: DeviceClock, naming: AbstractContextManager[None]
) -> tuple[WholeSamples, tuple[PartSamples, ...]]:
    """The same with every part marked; `naming` makes the parts ranges."""
    parts = PartClock(clock)

    def timed() -> _Marks:
        marks = _timed(call, clock)
        parts.end_call()
        return marks

    with naming, heard_by(parts):
        probe = [timed() for _ in range(NUM_WARMUP)][-1]
        num_calls = _num_calls(probe, clock)
        parts.seconds()
        calls = [timed() for _ in range(num_calls)]
    return _samples(calls, clock), _part_samples(parts.seconds())


def graphed_samples(call: LayerCall, layer: MoELayer, clock: DeviceClock) -> WholeSamples:
    """`whole_samples` of the layer captured as CUDA graphs. The layer stays changed: measure it last.

    Raises MissingRequirementError where it cannot be captured.
    """
    replay = captured(layer, call.inputs.x.detach().unsqueeze(1).requires_grad_())
    built = replace(call.built, forward=lambda x: replay(x.unsqueeze(1)).squeeze(1))
    return whole_samples(replace(call, built=built), clock)


def held_samples(
    call: LayerCall,
    clock: DeviceClock,
    *,
    held_for_s: float,
    sm_clock_hz: Callable[[], float | None],
    is_tiny: bool,
) -> HeldSamples:
    """Bursts after pauses, then the layer without a pause for `held_for_s`."""
    burst = burst_samples_s(call, clock, pause_s=_TINY_PAUSE_S if is_tiny else PAUSE_S)
    held = held_samples_s(call, clock, held_for_s, window_s=_TINY_WINDOW_S if is_tiny else WINDOW_S)
    return HeldSamples(held_for_s=held_for_s, burst_s=burst, held_s=held, end_sm_clock_hz=sm_clock_hz())


_Marks = tuple[Any, Any, Any]
"""Before the forward pass, between the passes, after the backward pass."""


def _timed(call: LayerCall, clock: DeviceClock) -> _Marks:
    call.drop_gradients()
    clock.flush()
    start = clock.mark()
    middle = call.passes(clock.mark)
    return start, middle, clock.mark()


def _num_calls(probe: _Marks, clock: DeviceClock) -> int:
    return num_samples(clock.between_s(probe[0], probe[2]))


def _samples(calls: Sequence[_Marks], clock: DeviceClock) -> WholeSamples:
    return WholeSamples(
        forward_s=tuple(clock.between_s(start, middle) for start, middle, _ in calls),
        backward_s=tuple(clock.between_s(middle, end) for _, middle, end in calls),
    )


def _part_samples(seconds: Sequence[dict[tuple[str, Pass], float]]) -> tuple[PartSamples, ...]:
    """One for each part and pass that any call had, in the order in which they first ran."""
    names = dict.fromkeys(name for one in seconds for name in one)
    return tuple(
        PartSamples(
            part=part, in_pass=in_pass, samples_s=tuple(one.get((part, in_pass), 0.0) for one in seconds)
        )
        for part, in_pass in names
    )
