"""A MoE layer without communication, of the harness's own kernels, as a call to be held for a while."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moe_bench.harness.calibrate.inputs import DTYPES, normal
from moe_bench.harness.calibrate.memory import routed
from moe_bench.harness.kernels.activation import GatedActivation
from moe_bench.harness.kernels.grouped_linear import activated_grouped_linear, grouped_linear
from moe_bench.results.calibration import Dtype, MoeLayer
from moe_bench.results.calibration_tasks import RouterVariant


def moe_layer_call(what: MoeLayer, dtype: Dtype, device: str) -> Callable[[], object]:
    """Forward and backward: router, rows in turn to the experts, gated experts, rows summed up by token.

    Every expert gets as many rows, whatever the router says: its probabilities weigh the rows as in training.
    """
    kind, hidden, ffn = DTYPES[dtype], what.hidden_size, what.expert_ffn_hidden_size
    x = normal(what.num_tokens, hidden, dtype=kind, device=device).requires_grad_()
    gate = normal(what.num_experts, hidden, dtype=kind, device=device).mul_(hidden**-0.5)
    up = normal(what.num_experts, 2 * ffn, hidden, dtype=kind, device=device).mul_(hidden**-0.5)
    down = normal(what.num_experts, hidden, ffn, dtype=kind, device=device).mul_(ffn**-0.5)
    weights = [weight.requires_grad_() for weight in (gate, up, down)]
    router = RouterVariant(score="softmax", top_k=what.top_k)
    num_rows = what.num_tokens * what.top_k
    expert_of_row = torch.arange(num_rows, device=device) % what.num_experts
    order = expert_of_row.argsort(stable=True)
    token, expert = order // what.top_k, expert_of_row[order]
    offsets = torch.bincount(expert_of_row, minlength=what.num_experts).cumsum(0, dtype=torch.int32)
    activation = GatedActivation(alpha=1.0)
    gradient = torch.randn_like(x)

    def forward_and_backward() -> object:
        probabilities = routed((x @ gate.t()).float(), router)[token, expert]
        rows = grouped_linear(x.index_select(0, token), [up], offsets)
        rows = activated_grouped_linear(
            rows, probabilities, [down], offsets, activation=activation, recompute=False
        )
        output = torch.zeros_like(x).index_add(0, token, rows)
        return torch.autograd.grad(output, [x, *weights], gradient)

    return forward_and_backward
