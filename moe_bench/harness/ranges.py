"""Named ranges around what a step does, forward and backward: NVTX for profilers, marks for timers.

Code says `with range_named("fc1 wgrad"):` or `bounded("router", layer.route, x)`. While nobody listens both
cost one call and no node of the graph. Names end in the pass: `fwd`, `bwd`, or `dgrad` and `wgrad` where a
backward pass is seen from inside.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_bench.harness.substitution import Substitution, substituted


class Listener(Protocol):
    """Is told where ranges start and end, by the thread that queues their work."""

    def start(self, name: str) -> Any:
        """Note the start; what is returned comes back at the end."""

    def end(self, started: Any) -> None:
        """Note the end of what `start` returned."""


class NvtxListener:
    """Ranges of NVIDIA's profilers, which may overlap: autograd decides in what order parts end."""

    def start(self, name: str) -> int:
        """Start a range of the process."""
        return int(torch.cuda.nvtx.range_start(name))

    def end(self, started: int) -> None:
        """End it."""
        torch.cuda.nvtx.range_end(started)


def range_named(name: str) -> AbstractContextManager[None]:
    """The block under this name, for whoever listens."""
    listener = _listener()
    return _NOTHING if listener is None else _heard(listener, name)


def bounded(name: str, call: Callable[..., Any], *inputs: Any) -> Any:
    """`call(*inputs)` as the range `<name> fwd`, and its backward pass as `<name> bwd`.

    The backward range starts when the gradients of all outputs have arrived, and ends when those of all
    inputs have gone out; a part whose inputs need no gradient has none. Outputs are a tensor or a tuple.
    """
    listener = _listener()
    if listener is None:
        return call(*inputs)
    span = _BackwardSpan(listener, f"{name} bwd")
    has_backward = torch.is_grad_enabled() and any(map(_has_gradient, inputs))
    if has_backward:
        inputs = _through(span.end, inputs)
    with _heard(listener, f"{name} fwd"):
        outputs = call(*inputs)
    if not has_backward:
        return outputs
    if isinstance(outputs, Tensor):
        return _through(span.start, (outputs,))[0]
    return _through(span.start, tuple(outputs))


@contextlib.contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Tell `listener` of every range until the block ends, whichever thread runs it: autograd has its own."""
    with substituted(Substitution(sys.modules[__name__], "_listener", lambda: listener)):
        yield


def _listener() -> Listener | None:
    """Who listens; `heard_by` puts another function in the place of this one."""
    return None


_NOTHING = contextlib.nullcontext()


@contextlib.contextmanager
def _heard(listener: Listener, name: str) -> Iterator[None]:
    started = listener.start(name)
    try:
        yield
    finally:
        listener.end(started)


class _BackwardSpan:
    """One backward range, between the two nodes of the graph that bound it."""

    def __init__(self, listener: Listener, name: str) -> None:
        self._listener, self._name = listener, name
        self._started: list[Any] = []

    def start(self) -> None:
        self._started.append(self._listener.start(self._name))

    def end(self) -> None:
        if self._started:
            self._listener.end(self._started.pop())


class _Bound(torch.autograd.Function):
    """Passes tensors on; in front of a part its backward pass comes by here last, behind the part first."""

    @staticmethod
    def forward(ctx: Any, note: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.note = note
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.note()
        return None, *gradients


def _has_gradient(value: object) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _through(note: Callable[[], None], values: tuple[Any, ...]) -> tuple[Any, ...]:
    """The values, those with a gradient passed through one node of the graph that notes its backward pass."""
    passed = iter(_Bound.apply(note, *filter(_has_gradient, values)))
    return tuple(next(passed) if _has_gradient(value) else value for value in values)
