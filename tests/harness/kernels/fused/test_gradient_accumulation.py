"""Experts that add their weight gradients to Megatron-Core's gradient buffer, against those that do not."""

from functools import partial
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.moe.moe_layer import MoELayer

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.experts import ExpertFusions, GroupedExperts
from moe_bench.harness.kernels.fused.activation import TritonGatedActivation
from moe_bench.harness.kernels.fused.weight_gradient import accumulate_weight_gradient
from tests.harness.kernels.configs import gpt_oss_experts, small_config
from tests.harness.kernels.fused.layers import moe_layer, trained
from tests.harness.kernels.fused.test_weight_gradient import SMALL

FUSED = ExpertFusions(
    activation=TritonGatedActivation.of, accumulate=partial(accumulate_weight_gradient, tile=SMALL)
)


def accumulated(fusions: ExpertFusions, changes: dict[str, Any], *, overlap: bool) -> dict[str, torch.Tensor]:
    """The gradient buffers after two micro batches under DistributedDataParallel."""
    config = small_config(**changes)
    layer = moe_layer(MoELayer, config, experts=partial(GroupedExperts, fusions=fusions))
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, overlap_grad_reduce=overlap)
    wrapped = DistributedDataParallel(config, ddp, layer)
    wrapped.zero_grad_buffer()
    with wrapped.no_sync():
        trained(wrapped)
    trained(wrapped, rank=1)
    if overlap:
        wrapped.finish_grad_sync()
    assert all(parameter.grad is None for parameter in layer.parameters())
    return {name: parameter.main_grad.clone() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize(
    "overlap", [pytest.param(False, id="late", marks=pytest.mark.slow), pytest.param(True, id="overlapped")]
)
def test_the_buffer_holds_the_sum_over_micro_batches(groups: Any, host: str, overlap: bool) -> None:
    plain = accumulated(ExpertFusions(), {}, overlap=overlap)
    fused = accumulated(FUSED, {}, overlap=overlap)
    for name, value in plain.items():
        torch.testing.assert_close(
            fused[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert any("experts" in name and value.any() for name, value in fused.items())


def test_the_activation_kernel_serves_gpt_oss(groups: Any, host: str) -> None:
    plain, fused = (
        trained(
            moe_layer(MoELayer, small_config(**gpt_oss_experts()), experts=partial(GroupedExperts, fusions=f))
        )
        for f in (ExpertFusions(), ExpertFusions(activation=TritonGatedActivation.of))
    )
    for name, value in plain.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-5, atol=1e-6)


def test_a_record_names_the_kernels_that_are_on(groups: Any, host: str) -> None:
    layer = moe_layer(MoELayer, small_config(), experts=partial(GroupedExperts, fusions=FUSED))
    assert layer.experts.implementation == "torch:grouped_mm+triton:activation+triton:gradient_accumulation"


def test_weights_without_a_gradient_buffer_are_refused(groups: Any, host: str) -> None:
    layer = moe_layer(MoELayer, small_config(), experts=partial(GroupedExperts, fusions=FUSED))
    with pytest.raises(MissingRequirementError, match="have no main_grad to add to"):
        trained(layer)
