"""DeepSpeed's MoE layer (deepspeed.moe.layer.MoE) as an engine: GShard's dispatch into equal buffers.

The layer takes one expert module and copies it; the experts here are those a user would write. With
`drop_tokens=False` every expert computes as many rows as the busiest one has, the rest of them zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.layer.engine import BuiltLayer
from moe_bench.harness.layer.peers import obstacles
from moe_bench.harness.layer.peers.modules import (
    drop_gradients,
    expert_gradients,
    experts_of,
    gradient_of,
    linear_of,
)
from moe_bench.harness.layer.weights import LayerWeights
from moe_bench.spec.layer_case import LayerCase

PIP_LINE = 'pip install "deepspeed>=0.19"'


class DeepSpeed:
    """Its layer on one rank, without dropped tokens, noise or random choices."""

    name = "deepspeed"
    package = "deepspeed"

    def obstacle(self, case: LayerCase) -> str | None:
        """Why it cannot run the case: absent, or a router that `TopKGate` is not."""
        moe = case.moe
        return (
            obstacles.not_plain(case)
            or obstacles.not_plain_softmax(case)
            or obstacles.has_shared_expert(case)
            or obstacles.first_problem(
                (
                    (case.linear_bias, "its router has no bias"),
                    (moe.top_k > 1 and not moe.router.renormalise, "its router renormalises from top-2 on"),
                    (moe.top_k == 1 and moe.router.renormalise, "its router does not renormalise top-1"),
                )
            )
            or obstacles.not_installed("deepspeed", PIP_LINE)
        )

    @contextmanager
    def build(self, case: LayerCase, weights: LayerWeights, *, device: str) -> Iterator[BuiltLayer]:
        """The layer, on the memory of `weights`."""
        if (reason := self.obstacle(case)) is not None:
            raise MissingRequirementError(f"{self.name}: {reason}")
        del device  # where the weights are
        layer = import_module("deepspeed.moe.layer").MoE(
            hidden_size=case.hidden_size,
            expert=nn.Identity(),
            num_experts=case.moe.num_experts,
            ep_size=1,
            k=case.moe.top_k,
            min_capacity=1,
            drop_tokens=False,
            use_rts=False,
            top2_2nd_expert_sampling=False,
        )
        inner = layer.deepspeed_moe
        inner.gate.wg = linear_of(weights.router)
        inner.experts.deepspeed_experts = nn.ModuleList(experts_of(weights, case.activation))

        def forward(x: Tensor) -> Tensor:
            output: Tensor = layer(x)[0]  # beside it the balancing loss and the experts' counts
            return output

        yield BuiltLayer(
            forward=forward,
            gradients=partial(_gradients, inner),
            clear_gradients=partial(drop_gradients, layer),
            implementation="deepspeed.moe.layer.MoE",
            module=layer,
        )


def _gradients(layer: Any) -> LayerWeights:
    return LayerWeights(
        router=gradient_of(layer.gate.wg.weight), **expert_gradients(layer.experts.deepspeed_experts)
    )
