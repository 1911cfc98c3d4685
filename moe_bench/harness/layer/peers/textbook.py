"""The MoE layer as a textbook writes it: expert after expert, its tokens gathered, its outputs added back.

    y[t] = sum over the experts e that token t chose of p[t, e] * E_e(x[t]), plus the shared expert's output
    E_e(x) = W2_e a(W1_e x + b1_e) + b2_e

It is one of the compared engines and, in float64, the reference that the others are held against.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from moe_bench.harness.layer.engine import BuiltLayer
from moe_bench.harness.layer.peers import obstacles
from moe_bench.harness.layer.peers.modules import (
    Expert,
    drop_gradients,
    expert_gradients,
    experts_of,
    gradient_of,
    linear_of,
)
from moe_bench.harness.layer.peers.routing import choose
from moe_bench.harness.layer.weights import LayerWeights
from moe_bench.spec.layer_case import LayerCase


class TextbookLayer(nn.Module):
    """The module's equations on the memory of the given weights, in their type."""

    def __init__(self, case: LayerCase, weights: LayerWeights) -> None:
        super().__init__()
        self.moe = case.moe
        self.router = linear_of(weights.router, weights.router_bias)
        self.expert_bias = weights.expert_bias
        self.experts = nn.ModuleList(experts_of(weights, case.activation))
        self.shared: Expert | None = None
        self.shared_gate: nn.Linear | None = None
        if weights.shared_fc1 is not None and weights.shared_fc2 is not None:
            fc1, fc2 = linear_of(weights.shared_fc1), linear_of(weights.shared_fc2)
            self.shared = Expert(fc1, fc2, case.activation)
        if weights.shared_gate is not None:
            self.shared_gate = linear_of(weights.shared_gate)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, hidden] to the same."""
        choice = choose(self.router(x), self.moe, self.expert_bias)
        output = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            token, place = torch.where(choice.experts == index)
            rows = expert(x.index_select(0, token)) * choice.probabilities[token, place].unsqueeze(-1)
            output = output.index_add(0, token, rows.to(x.dtype))
        if self.shared is None:
            return output
        shared = self.shared(x)
        return output + (shared if self.shared_gate is None else self.shared_gate(x).sigmoid() * shared)

    def gradients(self) -> LayerWeights:
        """Gradients that a backward pass left."""
        found = {"router": gradient_of(self.router.weight), **expert_gradients(self.experts)}
        if self.router.bias is not None:
            found["router_bias"] = gradient_of(self.router.bias)
        if self.shared is not None:
            found["shared_fc1"] = gradient_of(self.shared.fc1.weight)
            found["shared_fc2"] = gradient_of(self.shared.fc2.weight)
        if self.shared_gate is not None:
            found["shared_gate"] = gradient_of(self.shared_gate.weight)
        return LayerWeights(**found)


class Textbook:
    """The loop as an engine."""

    name = "textbook"
    package = "torch"

    def obstacle(self, case: LayerCase) -> str | None:
        """Why it cannot run the case: it has plain products only, of one rank."""
        return obstacles.not_plain(case)

    @contextmanager
    def build(self, case: LayerCase, weights: LayerWeights, *, device: str) -> Iterator[BuiltLayer]:
        """The layer, on the memory of `weights`."""
        del device  # where the weights are
        layer = TextbookLayer(case, weights)
        yield BuiltLayer(
            forward=layer,
            gradients=layer.gradients,
            clear_gradients=partial(drop_gradients, layer),
            implementation="loop over experts, index_select and index_add",
            module=layer,
        )
