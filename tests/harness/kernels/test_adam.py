"""Adam with BF16 moments: alone against torch's AdamW, and inside Megatron-Core's distributed optimizer."""

from typing import Any

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels import adam as module
from moe_bench.harness.kernels.adam import StoredBf16Adam, low_precision_adam
from tests.harness.kernels.configs import small_config
from tests.harness.kernels.ranks import Groups

OPTIONS = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
FP32 = {"exp_avg_dtype": torch.float32, "exp_avg_sq_dtype": torch.float32}
BF16 = {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}


def step_with(optimizer: Any, parameter: torch.Tensor, gradients: list[torch.Tensor]) -> None:
    for gradient in gradients:
        parameter.decoupled_grad = gradient
        optimizer.step()


def test_with_fp32_moments_it_is_torchs_adamw() -> None:
    start, gradients = torch.randn(7, 5), [torch.randn(7, 5) for _ in range(5)]
    mine, theirs = start.clone(), torch.nn.Parameter(start.clone())
    step_with(StoredBf16Adam([mine], **FP32, **OPTIONS), mine, gradients)
    reference = torch.optim.AdamW([theirs], **OPTIONS)
    for gradient in gradients:
        theirs.grad = gradient
        reference.step()
    torch.testing.assert_close(mine, theirs.detach())


def test_bf16_moments_are_rounded_after_the_update_that_uses_them() -> None:
    """Two steps by hand in float64, each moment rounded where it is stored."""
    parameter, gradients = torch.tensor([1.0]), [torch.tensor([0.3]), torch.tensor([-0.7])]
    optimizer = StoredBf16Adam([parameter], **BF16, **OPTIONS)
    step_with(optimizer, parameter, gradients)
    weight, first, second = 1.0, 0.0, 0.0
    for num_steps, gradient in enumerate((0.3, -0.7), start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.95 * second + 0.05 * gradient**2
        denominator = (second / (1 - 0.95**num_steps)) ** 0.5 + 1e-8
        weight = weight * (1 - 0.05 * 0.1) - 0.05 * (first / (1 - 0.9**num_steps)) / denominator
        first, second = (torch.tensor(value).bfloat16().item() for value in (first, second))
    assert parameter.item() == pytest.approx(weight, rel=1e-6)
    assert optimizer.state[parameter]["exp_avg"].item() == first
    assert optimizer.state[parameter]["exp_avg_sq"].item() == second


def test_updates_too_small_for_bf16_add_up_in_the_fp32_weight() -> None:
    parameter = torch.ones(3, dtype=torch.bfloat16)
    optimizer = StoredBf16Adam([parameter], **BF16, **{**OPTIONS, "lr": 1e-4, "weight_decay": 0.0})
    step_with(optimizer, parameter, [torch.ones(3, dtype=torch.bfloat16)])
    assert parameter.tolist() == [1.0, 1.0, 1.0]
    step_with(optimizer, parameter, [torch.ones(3, dtype=torch.bfloat16)] * 39)
    assert optimizer.state[parameter]["master_param"].tolist() == pytest.approx([1 - 40e-4] * 3, rel=1e-4)
    assert parameter.tolist() == [0.99609375] * 3


def test_chunks_do_not_change_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    start, gradients = torch.randn(10), [torch.randn(10) for _ in range(3)]
    whole, chunked = start.clone(), start.clone()
    step_with(StoredBf16Adam([whole], **BF16, **OPTIONS), whole, gradients)
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 4)
    step_with(StoredBf16Adam([chunked], **BF16, **OPTIONS), chunked, gradients)
    assert torch.equal(whole, chunked)


def test_a_parameter_without_gradient_is_left_alone() -> None:
    parameter = torch.ones(2)
    optimizer = StoredBf16Adam([parameter], **BF16, **OPTIONS)
    optimizer.step()
    assert parameter.tolist() == [1.0, 1.0]
    assert not optimizer.state[parameter]


def test_checkpoints_read_and_write_the_state_in_fp32() -> None:
    parameter = torch.randn(4, dtype=torch.bfloat16)
    optimizer = StoredBf16Adam([parameter], **BF16, **OPTIONS)
    optimizer.set_scaled_state(parameter, "exp_avg", torch.full((4,), 0.5))
    assert optimizer.state[parameter]["exp_avg"].dtype == torch.bfloat16
    assert optimizer.get_unscaled_state(parameter, "exp_avg").tolist() == [0.5] * 4
    assert optimizer.get_unscaled_state(parameter, "exp_avg").dtype == torch.float32
    assert torch.equal(optimizer.get_unscaled_state(parameter, "master_param"), parameter.float())


def test_types_that_need_scaling_are_refused() -> None:
    with pytest.raises(MissingRequirementError, match="exp_avg_sq_dtype"):
        StoredBf16Adam(
            [torch.ones(1)], exp_avg_dtype=torch.float32, exp_avg_sq_dtype=torch.float16, **OPTIONS
        )


def trained(groups: Groups, kind: str) -> tuple[list[torch.Tensor], set[torch.dtype]]:
    """Gradient norms and parameters of a BF16 model over three steps, and the types of its moments.

    Gradients are FP32, except with BF16 moments: without Transformer Engine or apex, Megatron-Core rounds the
    norm of BF16 gradients to BF16, so that nothing would be equal to the last bit.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    torch.manual_seed(5)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)).bfloat16()
    config = small_config(params_dtype=torch.bfloat16, bf16=True)
    ddp_config = DistributedDataParallelConfig(
        use_distributed_optimizer=True, grad_reduce_in_fp32=kind != "bf16"
    )
    wrapped = DistributedDataParallel(config, ddp_config, layers)
    optimizer_config = OptimizerConfig(
        optimizer="adam", lr=1e-2, bf16=True, use_distributed_optimizer=True, clip_grad=1.0
    )
    options = {"use_gloo_process_groups": False}
    if kind == "plain":
        optimizer = get_megatron_optimizer(optimizer_config, [wrapped], **options)
    else:
        types = FP32 if kind == "fp32" else BF16
        optimizer = low_precision_adam(optimizer_config, [wrapped], **types, **options)
    generator = torch.Generator().manual_seed(groups.dp.rank())
    norms = []
    for _ in range(3):
        wrapped.zero_grad_buffer()
        optimizer.zero_grad()
        x = torch.randn(4, 8, generator=generator).bfloat16()
        wrapped(x).float().square().mean().backward()
        wrapped.finish_grad_sync()
        _, norm, _ = optimizer.step()
        norms.append(float(norm))
    moments = {
        state[name].dtype
        for part in optimizer.chained_optimizers
        for state in part.optimizer.state.values()
        for name in ("exp_avg", "exp_avg_sq")
    }
    return [torch.tensor(norms), *(parameter.detach() for parameter in layers.parameters())], moments


@pytest.mark.parametrize("world_size", [1, 2])
def test_megatron_core_steps_with_it_as_with_its_own_adam(world_size: int, run_ranks: Any) -> None:
    plain = run_ranks(trained, world_size, {}, "plain")
    exact = run_ranks(trained, world_size, {}, "fp32")
    for (expected, _), (mine, moments) in zip(plain, exact, strict=True):
        assert moments == {torch.float32}
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_megatron_core_keeps_the_moments_in_bf16_and_all_ranks_alike(run_ranks: Any) -> None:
    plain = run_ranks(trained, 2, {}, "plain")
    rounded = run_ranks(trained, 2, {}, "bf16")
    for one, other in zip(rounded[0][0], rounded[1][0], strict=True):
        assert torch.equal(one, other)
    for (expected, _), (mine, moments) in zip(plain, rounded, strict=True):
        assert moments == {torch.bfloat16}
        for one, other in zip(mine, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizer": "sgd"}, "optimizer sgd"),
        ({"use_distributed_optimizer": False}, "no distributed optimizer"),
        ({"decoupled_weight_decay": False}, "weight decay inside the gradient"),
    ],
)
def test_other_optimizers_are_refused(changes: dict[str, Any], named: str) -> None:
    from types import SimpleNamespace

    from megatron.core.optimizer import OptimizerConfig

    config = OptimizerConfig(
        **{"optimizer": "adam", "lr": 1e-2, "use_distributed_optimizer": True, **changes}
    )
    chunk = SimpleNamespace(ddp_config=SimpleNamespace(use_megatron_fsdp=False))
    with pytest.raises(MissingRequirementError, match=named):
        low_precision_adam(config, [chunk], **BF16)


@pytest.mark.gpu("torch.compile makes another kernel there")
def test_the_compiled_update_equals_the_plain_one() -> None:
    start, gradients = torch.randn(1000), [torch.randn(1000) for _ in range(3)]
    host, device = start.clone(), start.cuda()
    step_with(StoredBf16Adam([host], **BF16, **OPTIONS), host, gradients)
    step_with(
        StoredBf16Adam([device], **BF16, **OPTIONS), device, [gradient.cuda() for gradient in gradients]
    )
    torch.testing.assert_close(device.cpu(), host, rtol=1e-3, atol=1e-4)
