"""From plain arguments to Megatron-Core's objects: types, functions, hooks, and the model of each chunk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.fusions.fused_bias_geglu import quick_gelu

from moe_bench.harness import build as build_module
from moe_bench.harness.build import transformer_config
from moe_bench.harness.host_device import host_device
from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.patches import patches
from moe_bench.harness.process_groups import process_groups
from moe_bench.harness.rank import build, wanted_patches
from moe_bench.harness.settings import settings_of
from moe_bench.harness.workers import Seat
from moe_bench.spec.recipe import Overlap, Recipe
from tests.harness.toys import laid_out, parity_recipe, smoke_recipe
from tests.harness.zygote import Zygote


def test_names_become_types_and_functions() -> None:
    config = transformer_config(megatron_arguments(smoke_recipe("gpt_oss_20b")))
    assert config.params_dtype is config.pipeline_dtype is torch.bfloat16
    assert config.activation_func is quick_gelu
    assert config.moe_router_dtype == "fp32"
    assert config.moe_layer_freq == [1] * config.num_layers


def test_yarn_of_grouped_query_attention_is_set_beside_the_fields() -> None:
    config = transformer_config(megatron_arguments(smoke_recipe("gpt_oss_20b")))
    assert config.yarn_rotary_scaling_factor == 32.0
    assert config.yarn_correction_range_round_to_int is False


def interleaved_recipe() -> Recipe:
    return laid_out(
        parity_recipe("deepseek_v3"),
        parallel={"num_gpus": 2, "pipeline": 2, "virtual_pipeline": 2},
        overlap=Overlap(p2p=True, grad_reduce=True, param_gather=True, align_param_gather=True),
    )


def describe(seat: Seat) -> dict[str, Any]:
    arguments = megatron_arguments(interleaved_recipe())
    settings = settings_of(arguments)
    with (
        host_device(),
        patches(wanted_patches(settings)),
        process_groups(
            seat.rendezvous, backend="gloo", sizes=arguments.parallel_state, listen_fd=seat.listen_fd
        ),
    ):
        built = build(arguments, settings, device="cpu")
        models = [chunk.module for chunk in built.chunks]
        config = built.config
        return {
            "layers": [[layer.layer_number for layer in model.decoder.layers] for model in models],
            "ends": [(model.pre_process, model.post_process, model.mtp_process) for model in models],
            "hooks": [
                [hook.__self__ is chunk for hook, chunk in zip(hooks, built.chunks, strict=True)]
                for hooks in (config.no_sync_func, config.grad_sync_func, config.param_sync_func)
            ],
            "scale": config.grad_scale_func.__self__ is built.optimizer,
            "finalize": config.finalize_model_grads_func.__name__,
        }


def test_each_chunk_has_its_layers_its_ends_and_its_hooks(zygote: Zygote) -> None:
    first, last = zygote.fork(2, describe)
    assert (first["layers"], last["layers"]) == ([[1], [3]], [[2], [4]])
    assert first["ends"] == [(True, False, False), (False, False, False)]
    assert last["ends"] == [(False, False, False), (False, True, True)]
    for rank in (first, last):
        assert rank["hooks"] == [[True, True]] * 3
        assert rank["scale"]
        assert rank["finalize"] == "finalize_model_grads"


@pytest.mark.parametrize(("gathers_in_step", "is_whole"), [(False, [False, True]), (True, [True, True])])
def test_buckets_are_those_of_megatron_lm(
    monkeypatch: pytest.MonkeyPatch, gathers_in_step: bool, is_whole: list[bool]
) -> None:
    """megatron/training/training.py, per_chunk_disable_bucketing."""
    found: list[bool] = []

    def wrapped(*args: object, disable_bucketing: bool) -> torch.nn.Module:
        found.append(disable_bucketing)
        return torch.nn.Identity()

    monkeypatch.setattr(build_module, "DistributedDataParallel", wrapped)
    chunks = (torch.nn.Identity(), torch.nn.Identity())
    ddp_config = DistributedDataParallelConfig()
    build_module._wrap(chunks, None, ddp_config, device="cpu", gathers_in_step=gathers_in_step)
    assert found == is_whole


def test_adam_in_one_kernel_steps_as_the_plain_one() -> None:
    start, gradients = torch.randn(100), [torch.randn(100) for _ in range(3)]
    plain, fused = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [torch.optim.AdamW([param], lr=0.1, weight_decay=0.1) for param in (plain, fused)]
    build_module._fuse(optimizers[1:])
    for gradient in gradients:
        for param, optimizer in zip((plain, fused), optimizers, strict=True):
            param.grad = gradient.clone()
            optimizer.step()
    assert optimizers[1].param_groups[0]["fused"]
    torch.testing.assert_close(fused, plain)
