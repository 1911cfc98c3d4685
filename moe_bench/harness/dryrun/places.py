"""Where the program is: in which phase of the step, and in which module, on the way forward and backward.

Forward, the module is the innermost whose `forward` runs. Backward, it is the one that created the autograd
node that runs: torch numbers the nodes of a thread in order, so it is enough to note at which number each
module was entered and left.
"""

from __future__ import annotations

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.autograd import _get_sequence_nr


class Phase(StrEnum):
    """What a rank is doing."""

    BUILD = "build"
    FORWARD = "forward"
    RECOMPUTE = "recompute"
    BACKWARD = "backward"
    PIPELINE = "pipeline"
    """Sending to and receiving from pipeline neighbours."""
    GRADIENT_SYNC = "gradient sync"
    """Reducing gradients over the data-parallel ranks."""
    PARAMETER_SYNC = "parameter sync"
    """Gathering the weights that the optimizer has updated."""
    FINALIZE = "finalize"
    """What is left between the last backward pass and the optimizer."""
    OPTIMIZER = "optimizer"


OUTSIDE = "-"
"""Place of what no module of the model does."""


class Spot(NamedTuple):
    """A place that is cheap to note and named later: a module's name, or the number of an autograd node."""

    phase: Phase
    module: str
    node: int | None


class Places:
    """Follows the program through phases and modules while it is entered as a context."""

    def __init__(self) -> None:
        self.phase = Phase.BUILD
        self._names: dict[int, str] = {}
        self._stack: list[str] = []
        self._recomputing: list[int] = []
        """Numbers of the autograd nodes whose recomputation runs, innermost last."""
        self._marks: list[int] = []
        """Sequence numbers from which on `_marked` names the module that creates nodes."""
        self._marked: list[str] = []

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Follow every module call until the block ends."""
        hooks = torch.nn.modules.module
        handles = (
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Be in this phase until the block ends."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextlib.contextmanager
    def recomputing(self) -> Iterator[None]:
        """Run a part again, in the middle of a backward pass, until the block ends.

        Whatever runs under the autograd node that asked for it is recomputation; a backward pass that starts
        inside the block runs under nodes of its own.
        """
        node = _current_node()
        if node is None:
            yield
            return
        self._recomputing.append(node)
        try:
            with self.inside(self.module(Spot(Phase.RECOMPUTE, OUTSIDE, node))):
                yield
        finally:
            self._recomputing.pop()

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """Be in the module of this name until the block ends, where none is called as such."""
        self._stack.append(name)
        self._mark()
        try:
            yield
        finally:
            self._stack.pop()
            self._mark()

    def name_modules(self, chunks: Sequence[torch.nn.Module]) -> None:
        """Learn the modules' names, with layers numbered from 0 over the whole model."""
        for chunk in chunks:
            prefixes: dict[str, str] = {}
            for name, module in chunk.named_modules():
                parent, _, own = name.rpartition(".")
                renamed = _global_name(module) or f"{prefixes.get(parent, parent)}.{own}".strip(".")
                prefixes[name] = renamed
                self._names[id(module)] = renamed

    def spot(self) -> Spot:
        """Where the program is now."""
        phase = self.phase
        if phase is not Phase.FORWARD:
            return Spot(phase, self._stack[-1] if self._stack else OUTSIDE, None)
        node = _current_node()
        if node is None:
            return Spot(phase, self._stack[-1] if self._stack else OUTSIDE, None)
        if self._recomputing and node == self._recomputing[-1]:
            return Spot(Phase.RECOMPUTE, self._stack[-1], None)
        return Spot(Phase.BACKWARD, OUTSIDE, node)

    def module(self, spot: Spot) -> str:
        """Name of the module at a spot."""
        if spot.node is None:
            return spot.module
        index = bisect_right(self._marks, spot.node) - 1
        return self._marked[index] if index >= 0 else OUTSIDE

    def name_of(self, module: torch.nn.Module) -> str:
        """Global name of a module."""
        return self._names.get(id(module), OUTSIDE)

    def where(self) -> tuple[str, str]:
        """Phase and layer, for a ledger; buckets of weights and gradients are of no one layer."""
        spot = self.spot()
        is_bucket = spot.phase in (Phase.GRADIENT_SYNC, Phase.PARAMETER_SYNC)
        return spot.phase.value, OUTSIDE if is_bucket else layer_of(self.module(spot))

    def _enter(self, module: torch.nn.Module, inputs: object) -> None:
        self._stack.append(self._names.get(id(module)) or (self._stack[-1] if self._stack else OUTSIDE))
        self._mark()

    def _leave(self, module: torch.nn.Module, inputs: object, output: object) -> None:
        self._stack.pop()
        self._mark()

    def _mark(self) -> None:
        self._marks.append(_get_sequence_nr())
        self._marked.append(self._stack[-1] if self._stack else OUTSIDE)


def _current_node() -> int | None:
    """Number of the autograd node that runs."""
    node: Any = torch._C._current_autograd_node()
    return None if node is None else node._sequence_nr()


def _global_name(module: torch.nn.Module) -> str | None:
    """`decoder.<n>` for a decoder layer of the whole model, `mtp.<n>` for an MTP layer, else None."""
    if isinstance(module, MultiTokenPredictionLayer):
        return f"mtp.{module.layer_number - 1}"
    if isinstance(module, TransformerLayer) and not getattr(module, "is_mtp_layer", False):
        return f"decoder.{module.layer_number - 1}"
    return None


def layer_of(module: str) -> str:
    """The layer that a module stands in, or the module's first name (`embedding`, `output_layer`)."""
    first, _, rest = module.partition(".")
    return f"{first}.{rest.partition('.')[0]}" if first in ("decoder", "mtp") and rest else first
