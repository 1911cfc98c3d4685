"""A dry run leaves nothing without values behind in the process that made it."""

import torch
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler

from moe_bench.harness.dryrun.meta_device import meta_device


def test_the_scales_of_auxiliary_losses_are_as_before() -> None:
    before = MoEAuxLossAutoScaler.main_loss_backward_scale, MTPLossAutoScaler.main_loss_backward_scale
    with meta_device():
        scale = torch.ones((), device="cuda")
        MoEAuxLossAutoScaler.set_loss_scale(scale)
        MTPLossAutoScaler.set_loss_scale(scale)
        assert MoEAuxLossAutoScaler.main_loss_backward_scale is scale
    after = MoEAuxLossAutoScaler.main_loss_backward_scale, MTPLossAutoScaler.main_loss_backward_scale
    assert after[0] is before[0]
    assert after[1] is before[1]


def test_cuda_is_read_as_meta_only_inside_the_block() -> None:
    with meta_device():
        assert torch.ones(3, device="cuda").device.type == "meta"
    assert torch.ones(3).device.type == "cpu"
