"""The weighted gated activation: values by hand, gradients against torch's own differentiation."""

import math

import pytest
import torch
from torch.nn import functional

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.activation import GatedActivation, Gelu, expert_activation, gated_forward, gelu
from tests.harness.kernels.configs import gpt_oss_experts, small_config

SWIGLU = GatedActivation(alpha=1.0)
GPT_OSS = GatedActivation(alpha=1.702, offset=1.0, clamp=0.7)


def test_swiglu_of_one_token_by_hand() -> None:
    x, probability = torch.tensor([[2.0, 3.0]]), torch.tensor([0.5])
    expected = 2.0 / (1 + math.exp(-2.0)) * 3.0 * 0.5
    assert SWIGLU.forward(x, probability).item() == pytest.approx(expected)


def test_clamped_swiglu_of_one_token_by_hand() -> None:
    """The gate is cut at the top alone, the linear part on both sides, and the offset comes after the cut."""
    x, probability = torch.tensor([[-2.0, 9.0, 9.0, -9.0]]), torch.tensor([1.0])
    first = -2.0 / (1 + math.exp(1.702 * 2.0)) * (0.7 + 1)
    second = 0.7 / (1 + math.exp(-1.702 * 0.7)) * (-0.7 + 1)
    assert GPT_OSS.forward(x, probability)[0].tolist() == pytest.approx([first, second])


@pytest.mark.parametrize("activation", [SWIGLU, GPT_OSS], ids=["swiglu", "clamped"])
def test_the_gradient_equals_torchs(activation: GatedActivation) -> None:
    x = torch.randn(7, 12, dtype=torch.float64, requires_grad=True)
    probabilities = torch.rand(7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 6, dtype=torch.float64)
    output = gated_forward(x, probabilities, activation.alpha, activation.offset, activation.clamp)
    output.backward(grad)
    grad_x, grad_probabilities = activation.backward(grad, x.detach(), probabilities.detach())
    torch.testing.assert_close(grad_x, x.grad)
    torch.testing.assert_close(grad_probabilities, probabilities.grad)


def test_gelu_and_its_gradient_are_torchs_tanh_approximation() -> None:
    x = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)
    probabilities = torch.rand(7, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(7, 6, dtype=torch.float64)
    expected = functional.gelu(x, approximate="tanh") * probabilities.unsqueeze(-1)
    expected.backward(grad)
    output = Gelu().forward(x.detach(), probabilities.detach())
    grad_x, grad_probabilities = Gelu().backward(grad, x.detach(), probabilities.detach())
    torch.testing.assert_close(output, expected.detach())
    torch.testing.assert_close(grad_x, x.grad)
    torch.testing.assert_close(grad_probabilities, probabilities.grad)


def test_a_clamped_value_has_no_gradient() -> None:
    x, probabilities = torch.tensor([[0.8, -0.6, 0.5, 0.9]]), torch.ones(1)
    grad_x, _ = GPT_OSS.backward(torch.ones(1, 2), x, probabilities)
    assert (grad_x != 0).tolist() == [[False, True, True, False]]


def test_types_stay_those_of_the_inputs() -> None:
    x, probabilities = torch.randn(3, 8, dtype=torch.bfloat16), torch.rand(3)
    output = SWIGLU.forward(x, probabilities)
    grad_x, grad_probabilities = SWIGLU.backward(torch.ones_like(output), x, probabilities)
    assert (output.dtype, grad_x.dtype, grad_probabilities.dtype) == (
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
    )


def test_the_configuration_says_which_activation_it_is() -> None:
    assert expert_activation(small_config()) == SWIGLU
    assert expert_activation(small_config(**gpt_oss_experts())) == GatedActivation(
        alpha=1.702, offset=1.0, clamp=0.3
    )


def test_gelu_is_the_one_activation_without_a_gate() -> None:
    assert expert_activation(small_config(gated_linear_unit=False, activation_func=gelu)) == Gelu()
    with pytest.raises(MissingRequirementError, match="gated by SiLU"):
        expert_activation(small_config(gated_linear_unit=False))


@pytest.mark.gpu("torch.compile makes another kernel there")
@pytest.mark.parametrize("activation", [SWIGLU, GPT_OSS], ids=["swiglu", "clamped"])
def test_the_compiled_activation_equals_the_plain_one(activation: GatedActivation) -> None:
    x, probabilities = torch.randn(65, 96), torch.rand(65)
    grad = torch.randn(65, 48)
    torch.testing.assert_close(
        activation.forward(x.cuda(), probabilities.cuda()).cpu(), activation.forward(x, probabilities)
    )
    fused = activation.backward(grad.cuda(), x.cuda(), probabilities.cuda())
    for mine, plain in zip(fused, activation.backward(grad, x, probabilities), strict=True):
        torch.testing.assert_close(mine.cpu(), plain, rtol=1e-5, atol=1e-5)
