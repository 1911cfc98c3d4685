"""Residual experts against their textbook: weights of both halves, biases, values and gradients."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.activation import gelu
from moe_bench.harness.kernels.shared_experts import BiasedSharedExperts, MixingMoELayer
from moe_bench.harness.routers import UnbiasedRouter
from tests.harness.kernels.configs import small_config
from tests.harness.kernels.fused.layers import moe_layer
from tests.harness.kernels.ranks import Groups

DEEPSPEED: dict[str, Any] = {
    "moe_router_topk": 1,
    "moe_router_pre_softmax": True,
    "moe_shared_expert_intermediate_size": 48,
    "gated_linear_unit": False,
    "activation_func": gelu,
    "add_bias_linear": True,
}


def residual_layer(**changes: Any) -> Any:
    """DeepSpeed's residual layer, of which no bias is zero."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules

    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layer = moe_layer(
        MixingMoELayer,
        small_config(**DEEPSPEED, **changes),
        shared_experts=partial(BiasedSharedExperts, submodules=mlp),
        router=UnbiasedRouter,
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in layer.named_parameters():
        scale = 5.0 if name.startswith("router") else 0.3
        parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return layer


def textbook(named: dict[str, Tensor], x: Tensor) -> Tensor:
    """w_1 p_e E_e(x) + w_2 M(x), e the best expert, w a softmax of two logits (arXiv:2201.05596, 4.1)."""
    mixing = functional.linear(x, named["mixing.weight"], named["mixing.bias"]).softmax(-1)
    p = (x @ named["router.weight"].T).softmax(-1)
    rows = []
    for token, best in enumerate(p.argmax(-1).tolist()):
        up = named["experts.linear_fc1.weight"][best] @ x[token] + named["experts.linear_fc1.bias"][best]
        down = named["experts.linear_fc2.weight"][best] @ functional.gelu(up, approximate="tanh")
        rows.append(p[token, best] * (down + named["experts.linear_fc2.bias"][best]))
    up = functional.linear(
        x, named["shared_experts.linear_fc1.weight"], named["shared_experts.linear_fc1.bias"]
    )
    shared = functional.linear(
        functional.gelu(up, approximate="tanh"),
        named["shared_experts.linear_fc2.weight"],
        named["shared_experts.linear_fc2.bias"],
    )
    return mixing[:, :1] * torch.stack(rows) + mixing[:, 1:] * shared


def test_a_residual_layer_computes_what_the_textbook_does(groups: Groups) -> None:
    layer = residual_layer()
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(12, 2, 64, generator=generator).requires_grad_()
    grad = torch.randn(12, 2, 64, generator=generator)
    output, _ = layer(x)
    output.backward(grad)
    named = {name: value.detach().double().requires_grad_() for name, value in layer.named_parameters()}
    plain = x.detach().double().view(-1, 64).requires_grad_()
    expected = textbook(named, plain)
    expected.backward(grad.double().view(-1, 64))
    close = partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4, check_dtype=False)
    close(output.view(-1, 64), expected)
    close(x.grad.view(-1, 64), plain.grad)
    for name, value in layer.named_parameters():
        close(value.grad, named[name].grad, msg=lambda text, name=name: f"{name}: {text}")
    assert "router.bias" not in named


@pytest.mark.parametrize("has_gate", [False, True])
def test_shared_experts_are_added_or_gated_as_the_textbook_says(groups: Groups, *, has_gate: bool) -> None:
    """arXiv:2401.06066, 3.2: the routed experts' output plus M(x), SwiGLU; with a gate, sigmoid(x g) M(x)."""
    from megatron.core.models.gpt.moe_module_specs import _build_shared_experts
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.moe_layer import MoELayer

    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    sizes = {"moe_shared_expert_intermediate_size": 48, "moe_shared_expert_gate": has_gate}
    shared = partial(_build_shared_experts, submodules=mlp)
    layer = moe_layer(MoELayer, small_config(**sizes), shared_experts=shared)
    routed_alone = moe_layer(MoELayer, small_config())
    routed_alone.load_state_dict(layer.state_dict(), strict=False)
    x = torch.randn(12, 2, 64, generator=torch.Generator().manual_seed(3))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    output = layer(inputs[0])[0]
    named = dict(layer.named_parameters())
    gate, linear = functional.linear(inputs[1], named["shared_experts.linear_fc1.weight"]).chunk(2, dim=-1)
    added = functional.linear(functional.silu(gate) * linear, named["shared_experts.linear_fc2.weight"])
    if has_gate:
        added = functional.linear(inputs[1], named["shared_experts.gate_weight"]).sigmoid() * added
    expected = routed_alone(inputs[1])[0] + added
    for each in (output, expected):
        each.square().sum().backward()
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)


def test_shared_experts_with_biases_refuse_a_gate(groups: Groups) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.mlp import MLPSubmodules

    with pytest.raises(MissingRequirementError, match="neither a gate nor overlap"):
        BiasedSharedExperts(
            small_config(**DEEPSPEED),
            MLPSubmodules(linear_fc1=None, linear_fc2=None),
            gate=True,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
