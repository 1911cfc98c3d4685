"""An MoE layer that gathers its rows against Megatron-Core with SequentialMLP, on one rank and two."""

from typing import Any

import pytest
import torch

from tests.harness.kernels.configs import small_config
from tests.harness.kernels.ranks import Groups


def both(groups: Groups, changes: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    """Output and gradients of one rank's layer: Megatron-Core's own, and quack's with the same weights."""
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend

    from moe_bench.harness.kernels.provider import KernelChoice, TorchNativeSpecProvider
    from moe_bench.harness.kernels.quack import products
    from moe_bench.harness.kernels.quack.provider import QuackSpecProvider
    from moe_bench.harness.substitution import Substitution, substituted
    from tests.harness.kernels.quack import plain_interface

    config = small_config(**changes)
    layers = []
    for provider, is_grouped in (
        (TorchNativeSpecProvider(KernelChoice(family="torch_native", device_type="cpu")), False),
        (QuackSpecProvider(KernelChoice(family="quack", device_type="cpu")), True),
    ):
        spec = get_moe_module_spec_for_backend(provider, config.num_moe_experts, is_grouped)
        layer = provider.moe_layer()
        layers.append(layer(config=config, layer_number=1, pg_collection=groups, **spec.keywords))
    copy_experts(*layers)
    with substituted(Substitution(products, "interface", lambda: plain_interface)):
        return [trained(layer) for layer in layers]


def copy_experts(sequential: Any, gathering: Any) -> None:
    for index, expert in enumerate(sequential.experts.local_experts):
        for name, parameter in expert.named_parameters():
            gathering.experts.get_parameter(name).data[index].copy_(parameter.data)
    gathering.router.load_state_dict(sequential.router.state_dict())
    if getattr(sequential, "shared_experts", None) is not None:
        gathering.shared_experts.load_state_dict(sequential.shared_experts.state_dict())


def trained(layer: Any) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3 + torch.distributed.get_rank())
    x, grad = (torch.randn(24, 2, 64, generator=generator) for _ in range(2))
    x.requires_grad_()
    output, _ = layer(x)
    output.backward(grad)
    found = {"output": output.detach(), "input": x.grad, "router": layer.router.weight.grad}
    if hasattr(layer.experts, "local_experts"):
        experts = [dict(expert.named_parameters()) for expert in layer.experts.local_experts]
        grads = {name: torch.stack([expert[name].grad for expert in experts]) for name in experts[0]}
    else:
        grads = {name: parameter.grad for name, parameter in layer.experts.named_parameters()}
    shared = getattr(layer, "shared_experts", None)
    if shared is not None:
        grads |= {f"shared {name}": parameter.grad for name, parameter in shared.named_parameters()}
    return found | grads


def assert_alike(sequential: dict[str, torch.Tensor], gathering: dict[str, torch.Tensor]) -> None:
    assert sequential.keys() == gathering.keys()
    for name, truth in sequential.items():
        torch.testing.assert_close(
            gathering[name], truth, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


SHARED = {"moe_shared_expert_intermediate_size": 48}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        SHARED,
        {**SHARED, "moe_shared_expert_overlap": True},
        {"moe_token_dispatcher_type": "allgather"},
        {"recompute_granularity": "selective", "recompute_modules": ["moe"]},
    ],
    ids=["gathered", "shared experts", "shared experts apart", "rows as they come", "recomputed"],
)
def test_one_rank_computes_what_megatron_core_does(changes: dict[str, Any], groups: Groups) -> None:
    assert_alike(*both(groups, changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_moe_experts": 2}, {**SHARED, "moe_shared_expert_overlap": True}],
    ids=["four experts each", "one expert each", "shared experts apart"],
)
def test_two_expert_ranks_compute_what_megatron_core_does(changes: dict[str, Any], run_ranks: Any) -> None:
    sizes = {"expert_model_parallel_size": 2}
    for sequential, gathering in run_ranks(both, 2, sizes, sizes | changes):
        assert_alike(sequential, gathering)
