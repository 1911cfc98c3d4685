"""One MoE layer of Megatron-Core, built in a rank of a test."""

from functools import partial
from typing import Any

import torch
from torch import Tensor


def moe_layer(layer: Any, config: Any, **submodules: Any) -> torch.nn.Module:
    """A layer whose weights depend on nothing but the configuration."""
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.moe.moe_layer import MoESubmodules

    from moe_bench.harness.kernels.experts import GroupedExperts

    torch.manual_seed(7)
    experts = {"experts": partial(GroupedExperts), **submodules}
    return layer(
        config=config,
        submodules=MoESubmodules(**experts),
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def trained(layer: torch.nn.Module, *, device: str = "cpu", rank: int = 0) -> dict[str, Tensor]:
    """Output and gradients of the input and of every weight, from a forward and a backward pass."""
    generator = torch.Generator().manual_seed(3 + rank)
    x = torch.randn(24, 2, 64, generator=generator).to(device).requires_grad_()
    grad = torch.randn(24, 2, 64, generator=generator).to(device)
    output = layer(x)
    output = output[0] if isinstance(output, tuple) else output
    output.backward(grad)
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "input": x.grad, **{n: g for n, g in grads.items() if g is not None}}
