"""What an engine is: something that makes a callable, differentiable MoE layer of a case and its weights."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from moe_bench.harness.layer.weights import LayerWeights
from moe_bench.spec.layer_case import LayerCase


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltLayer:
    """One layer of one engine, with weights of its own that were copied from those of the case."""

    forward: Callable[[Tensor], Tensor]
    """x [tokens, hidden] to the layer's output [tokens, hidden], differentiable in x and in the weights."""
    gradients: Callable[[], LayerWeights]
    """Gradients of the weights that the last backward passes left, in canonical form; copies."""
    clear_gradients: Callable[[], None]
    """What a training loop does before a step, so that the next backward pass costs what it costs there."""
    implementation: str
    """Classes or kernels that really stand in the layer, as `GroupedExperts:torch:grouped_mm`."""
    module: torch.nn.Module | None = None
    """The module, for hooks at its parts; None where there is none."""


class Engine(Protocol):
    """One way to run an MoE layer. Engines are stateless; `build` makes everything."""

    @property
    def name(self) -> str:
        """As in tables and records: `megatron torch_native`, `transformers Qwen3-MoE grouped`."""

    @property
    def package(self) -> str:
        """Distribution that it needs, as pip names it."""

    def obstacle(self, case: LayerCase) -> str | None:
        """Why it cannot run the case here: not installed, no such router, no GPU; None if it can.

        Must not import the package where a look at the installation is enough.
        """

    def build(
        self, case: LayerCase, weights: LayerWeights, *, device: str
    ) -> AbstractContextManager[BuiltLayer]:
        """The layer on `device` ("cuda" or "cpu"), there until the block ends.

        Raises MissingRequirementError where `obstacle` gives a reason.
        """
