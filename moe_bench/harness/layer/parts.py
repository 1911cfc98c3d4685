"""Takes a MoE layer of Megatron-Core apart: bounds around its phases, and seconds of each from marks.

| part | what runs in it |
|---|---|
| router | `route`: gate, scores, top-k, balancing losses |
| permute | dispatcher's `dispatch_preprocess` and `dispatch_postprocess`: counts, copies sorted by expert |
| dispatch, combine | `token_dispatch`, `token_combine`: the exchange between expert ranks |
| fc1, activation, fc2 | of the local experts; `experts` is what they do besides |
| unpermute | dispatcher's `combine_preprocess`, layer's `postprocess` with the shared experts' addition |
| shared experts | `shared_experts_compute` |
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

from megatron.core.transformer.moe.moe_layer import MoELayer

from moe_bench.harness.ranges import bounded
from moe_bench.harness.substitution import Substitution, substituted
from moe_bench.harness.timing import DeviceMarks
from moe_bench.results.layer_record import Pass

EXPERTS = "experts"
_PASSES: dict[str, Pass] = {"fwd": "forward", "bwd": "backward", "dgrad": "dgrad", "wgrad": "wgrad"}


@contextlib.contextmanager
def parts_named(layer: MoELayer) -> Iterator[None]:
    """Make the phases of `layer` ranges (moe_bench/harness/ranges.py) until the block ends."""
    with contextlib.ExitStack() as stack:
        for owner, method, name in _bounds(layer):
            inner = getattr(owner, method)
            stack.enter_context(substituted(Substitution(owner, method, partial(bounded, name, inner))))
        yield


def _bounds(layer: MoELayer) -> Iterator[tuple[Any, str, str]]:
    dispatcher, experts = layer.token_dispatcher, layer.experts
    yield layer, "route", "router"
    yield dispatcher, "dispatch_preprocess", "permute"
    yield dispatcher, "token_dispatch", "dispatch"
    yield dispatcher, "dispatch_postprocess", "permute"
    yield experts, "forward", EXPERTS
    for expert in getattr(experts, "local_experts", (experts,)):
        for linear in ("fc1", "fc2"):
            yield getattr(expert, f"linear_{linear}"), "forward", linear
    yield dispatcher, "combine_preprocess", "unpermute"
    yield dispatcher, "token_combine", "combine"
    yield layer, "postprocess", "unpermute"
    if layer.use_shared_expert and not layer.shared_expert_overlap:
        yield layer, "shared_experts_compute", "shared experts"


@dataclass(slots=True)
class _Range:
    part: str
    in_pass: Pass


@dataclass(slots=True)
class PartClock:
    """Marks the clock where ranges start and end, and tells what each part took.

    A moment belongs to the innermost range that is open, so that it is counted once. Nothing is waited for
    before `seconds`, so that the host can stay ahead of the device as it does without marks.
    """

    clock: DeviceMarks
    _open: list[_Range] = field(default_factory=list)
    _calls: list[list[tuple[Any, _Range | None]]] = field(default_factory=lambda: [[]])
    """For each call its marks, each with the range that is innermost from there on."""

    def start(self, name: str) -> _Range:
        """Open a range; `dgrad` and `wgrad` alone are of the part that is open, or of the experts."""
        part, _, last = name.rpartition(" ")
        enclosing = self._open[-1].part if self._open else EXPERTS
        started = _Range(part or enclosing, _PASSES[last])
        self._open.append(started)
        self._mark()
        return started

    def end(self, started: _Range) -> None:
        """Close it."""
        # by identity: the same part may be open twice
        self._open = [one for one in self._open if one is not started]
        self._mark()

    def end_call(self) -> None:
        """What follows is of another call."""
        self._calls.append([])

    def seconds(self) -> tuple[dict[tuple[str, Pass], float], ...]:
        """What each part and pass took, for every call that has ended since this was last asked."""
        ended, self._calls = self._calls[:-1], self._calls[-1:]
        return tuple(map(self._seconds_of, ended))

    def _seconds_of(self, marks: list[tuple[Any, _Range | None]]) -> dict[tuple[str, Pass], float]:
        totals: defaultdict[tuple[str, Pass], float] = defaultdict(float)
        for (mark, innermost), (next_mark, _) in pairwise(marks):
            if innermost is not None:
                totals[innermost.part, innermost.in_pass] += self.clock.between_s(mark, next_mark)
        return dict(totals)

    def _mark(self) -> None:
        self._calls[-1].append((self.clock.mark(), self._open[-1] if self._open else None))
