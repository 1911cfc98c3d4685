"""MegaBlocks' dropless MoE layer (arXiv:2211.15841; megablocks.layers.dmoe.dMoE) as an engine.

Its experts run on the grouped product of the package grouped_gemm (`mlp_impl="grouped"`); the block-sparse
ones need Triton older than 3.2 (layers/arguments.py). Its router computes logits and softmax in BF16.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.layer.engine import BuiltLayer
from moe_bench.harness.layer.peers import obstacles
from moe_bench.harness.layer.peers.modules import drop_gradients, gradient_of
from moe_bench.harness.layer.weights import LayerWeights, dtype_of
from moe_bench.spec.layer_case import LayerCase

PIP_LINE = "pip install --no-build-isolation --no-deps megablocks grouped_gemm stanford-stk"
"""Without dependencies: megablocks 0.10 asks for torch 2.7.0."""


class MegaBlocks:
    """Its dropless layer on one rank, without balancing loss."""

    name = "megablocks"
    package = "megablocks"

    def obstacle(self, case: LayerCase) -> str | None:
        """Why it cannot run the case: absent, no GPU, or another layer than its."""
        moe = case.moe
        return (
            obstacles.not_plain(case)
            or obstacles.not_plain_softmax(case)
            or obstacles.not_swiglu(case)
            or obstacles.first_problem(
                (
                    (case.precision != "bf16", "grouped_gemm's product is BF16"),
                    (moe.shared_expert_gate, "its shared expert has no gate"),
                )
            )
            or obstacles.not_installed("megablocks", PIP_LINE)
            or obstacles.not_installed("grouped_gemm", PIP_LINE)
            or (None if torch.cuda.is_available() else "its kernels run on a GPU")
        )

    @contextmanager
    def build(self, case: LayerCase, weights: LayerWeights, *, device: str) -> Iterator[BuiltLayer]:
        """The layer; the router's and the second matrices' memory is that of `weights`' copies."""
        if (reason := self.obstacle(case)) is not None:
            raise MissingRequirementError(f"{self.name}: {reason}")
        layer = build_dmoe(case, weights, device=device)

        def forward(x: Tensor) -> Tensor:
            output: Tensor = layer(x.unsqueeze(1))  # [sequence, batch, hidden]
            return output.squeeze(1)

        yield BuiltLayer(
            forward=forward,
            gradients=partial(dmoe_gradients, layer),
            clear_gradients=partial(drop_gradients, layer),
            implementation="megablocks dMoE:grouped",
            module=layer,
        )


def build_dmoe(case: LayerCase, weights: LayerWeights, *, device: str) -> Any:
    """The module on `device`, with the given weights.

    The experts' `w1` and `v1` are the gate's and the linear half's rows of all experts, [E * n, d]; `w2` [E *
    n, d] holds the second matrices transposed (layers/glu.py).
    """
    moe, dtype = case.moe, dtype_of(case)
    arguments = import_module("megablocks.layers.arguments").Arguments(
        hidden_size=case.hidden_size,
        ffn_hidden_size=moe.expert_ffn_hidden_size,
        bias=False,
        return_bias=False,
        activation_fn=functional.silu,
        moe_num_experts=moe.num_experts,
        moe_top_k=moe.top_k,
        moe_normalize_expert_weights=1 if moe.router.renormalise else None,
        moe_loss_weight=0.0,
        mlp_type="glu",
        mlp_impl="grouped",
        fp16=False,
        bf16=dtype == torch.bfloat16,
        device=torch.device(device),
        shared_expert=bool(moe.shared_expert_ffn_hidden_size),
        shared_expert_hidden_size=moe.shared_expert_ffn_hidden_size or None,
        fc_kwargs={"dtype": dtype},
    )
    layer = import_module("megablocks.layers.dmoe").dMoE(arguments)
    gate, linear = weights.fc1.chunk(2, dim=1)
    layer.router.layer.weight = nn.Parameter(weights.router)
    experts = layer.experts.mlp
    experts.w1 = nn.Parameter(gate.flatten(0, 1))
    experts.v1 = nn.Parameter(linear.flatten(0, 1))
    experts.w2 = nn.Parameter(weights.fc2.transpose(1, 2).flatten(0, 1))
    if weights.shared_fc1 is not None and weights.shared_fc2 is not None:
        gate, linear = weights.shared_fc1.chunk(2)
        layer.shared_expert.gate_proj.weight = nn.Parameter(gate)
        layer.shared_expert.up_proj.weight = nn.Parameter(linear)
        layer.shared_expert.down_proj.weight = nn.Parameter(weights.shared_fc2)
    return layer


def dmoe_gradients(layer: Any) -> LayerWeights:
    """Gradients of the module in canonical form."""
    experts, num_experts = layer.experts.mlp, layer.router.layer.weight.shape[0]

    def per_expert(parameter: Tensor) -> Tensor:
        return gradient_of(parameter).unflatten(0, (num_experts, -1))

    found = {
        "router": gradient_of(layer.router.layer.weight),
        "fc1": torch.cat([per_expert(experts.w1), per_expert(experts.v1)], dim=1),
        "fc2": per_expert(experts.w2).transpose(1, 2),
    }
    if layer.shared_expert is not None:
        shared = layer.shared_expert
        halves = [gradient_of(linear.weight) for linear in (shared.gate_proj, shared.up_proj)]
        found |= {"shared_fc1": torch.cat(halves), "shared_fc2": gradient_of(shared.down_proj.weight)}
    return LayerWeights(**found)
