"""The experts' products in FP8: which they are, what they give, and what stays BF16."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.experts import GroupedExperts
from moe_bench.harness.kernels.fp8_grouped import RowwiseFp8Products, forget_after_steps
from moe_bench.harness.kernels.grouped_linear import PLAIN, Products, grouped_linear
from tests.harness.kernels.configs import small_config
from tests.harness.kernels.fp8_references import (
    columns_reference,
    emulated,
    product_reference,
    rows_reference,
)
from tests.harness.kernels.ranks import Groups, without_groups

COUNTS = [5, 0, 9, 2]
"""Odd numbers of tokens, and an expert without any."""
TOKENS = sum(COUNTS)


def offsets() -> Tensor:
    return torch.tensor(COUNTS).cumsum(0, dtype=torch.int32)


def passed(products: Products, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, and the gradients of tokens and weights, of one projection."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    output = grouped_linear(x, (weight,), offsets(), products)
    output.backward(grad)
    assert x.grad is not None
    assert weight.grad is not None
    return [output.detach(), x.grad, weight.grad]


def factors() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, weights and the output's gradient, BF16, their rows of very different sizes."""
    sizes = torch.logspace(-2, 2, TOKENS)[:, None]
    x, grad = (torch.randn(TOKENS, width) * sizes for width in (64, 48))
    return x.bfloat16(), torch.randn(4, 48, 64).bfloat16(), grad.bfloat16()


def test_outputs_and_input_gradients_are_products_of_quantized_rows() -> None:
    x, weight, grad = factors()
    with emulated() as taken:
        output, grad_x, _ = passed(RowwiseFp8Products(), x, weight, grad)
    assert torch.equal(
        output, product_reference(rows_reference(x), rows_reference(weight), offsets()).bfloat16()
    )
    backward = product_reference(rows_reference(grad), columns_reference(weight), offsets())
    assert torch.equal(grad_x, backward.bfloat16())
    assert taken == [((TOKENS, 64), (4, 64, 48), True), ((TOKENS, 48), (4, 48, 64), False)]


def test_the_weight_gradient_is_the_one_without_fp8() -> None:
    x, weight, grad = factors()
    with emulated():
        quantized = passed(RowwiseFp8Products(), x, weight, grad)
    plain = passed(PLAIN, x, weight, grad)
    assert torch.equal(quantized[2], plain[2])
    assert not torch.equal(quantized[0], plain[0])


def run_experts(module: GroupedExperts) -> list[Tensor]:
    """Output and gradients of tokens, probabilities and weights."""
    torch.manual_seed(1)
    device = module.linear_fc1.weights[0].device
    x = torch.randn(TOKENS, 64).bfloat16().to(device).requires_grad_()
    probabilities = torch.rand(TOKENS).to(device).requires_grad_()
    output, _ = module(x, torch.tensor(COUNTS), probabilities)
    output.backward(torch.randn(TOKENS, 64).bfloat16().to(device))
    gradients = [x.grad, probabilities.grad, *(weight.grad for weight in module.parameters())]
    return [output.detach(), *(gradient for gradient in gradients if gradient is not None)]


def both(groups: Groups, move: Callable[[GroupedExperts], GroupedExperts]) -> list[list[Tensor]]:
    """The same experts' results with plain and with FP8 products."""
    found = []
    for products in (PLAIN, RowwiseFp8Products()):
        torch.manual_seed(0)
        config = small_config(params_dtype=torch.bfloat16, bf16=True)
        module = GroupedExperts(4, config, pg_collection=groups, products=products)
        assert module.implementation == products.implementation
        for weight in module.parameters():
            torch.nn.init.normal_(weight, std=0.2)
        found.append(run_experts(move(module)))
    return found


def off_by(found: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm."""
    return ((found - truth).double().norm() / truth.double().norm()).item()


def test_experts_in_fp8_are_near_those_in_bf16_and_not_equal(groups: Groups) -> None:
    """A rounding to three mantissa bits is off by 2^-4 / sqrt(3) = 3.6 % at most in the mean square; three
    products of two rounded factors each, one after the other, reach 9 %, and a probability's gradient, whose
    terms cancel, somewhat more: 10 % with the numbers that torch 2.11 draws. A wrong scale is off by 50 %."""
    with emulated():
        plain, quantized = both(groups, lambda module: module)
    assert len(plain) == len(quantized) == 5
    assert all(0.005 < off_by(a, b) < 0.13 for a, b in zip(quantized, plain, strict=True))


def test_weights_are_quantized_once_until_an_optimizer_steps(groups: Groups) -> None:
    config = small_config(params_dtype=torch.bfloat16, bf16=True)
    module = GroupedExperts(4, config, pg_collection=groups, products=RowwiseFp8Products())
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    forget_after_steps([optimizer], [module])
    with emulated():
        first = run_experts(module)
        for weight in module.parameters():
            weight.data.neg_()  # as Megatron-Core's optimizers write: torch does not count it as a change
        assert torch.equal(run_experts(module)[0], first[0])
        optimizer.step()
        assert not torch.equal(run_experts(module)[0], first[0])


def test_weights_that_are_gathered_apart_are_quantized_at_every_use(groups: Groups) -> None:
    config = small_config(params_dtype=torch.bfloat16, bf16=True)
    module = GroupedExperts(4, config, pg_collection=groups, are_apart=True, products=RowwiseFp8Products())
    with emulated():
        first = run_experts(module)
        for weight in module.parameters():
            weight.data.mul_(2)
        assert not torch.equal(run_experts(module)[0], first[0])


def test_widths_that_the_kernel_does_not_take_are_refused(groups: Groups) -> None:
    config = small_config(params_dtype=torch.bfloat16, bf16=True, moe_ffn_hidden_size=24)
    GroupedExperts(4, config, pg_collection=groups)
    with pytest.raises(
        MissingRequirementError, match=r"expert_ffn_hidden_size_per_rank 24: .* multiples of 16"
    ):
        GroupedExperts(4, config, pg_collection=groups, products=RowwiseFp8Products())


@pytest.mark.gpu("scaled_grouped_mm has no CPU kernel")
def test_products_on_the_device_are_those_of_the_references() -> None:
    x, weight, grad = (one.cuda() for one in factors())
    products, ends = RowwiseFp8Products(), offsets().cuda()
    output, grad_x = products.output(x, weight, ends), products.input_gradient(grad, weight, ends)
    on_host = [one.cpu() for one in (x, weight, grad)]
    expected = product_reference(rows_reference(on_host[0]), rows_reference(on_host[1]), offsets())
    backward = product_reference(rows_reference(on_host[2]), columns_reference(on_host[1]), offsets())
    # BF16 outputs are off by 2^-9; fast accumulation drops bits below the largest term of a sum
    for found, truth in ((output, expected), (grad_x, backward)):
        rows = zip(found.cpu(), truth, strict=True)
        assert max(off_by(row, true_row) for row, true_row in rows) < 0.01


@pytest.mark.gpu("scaled_grouped_mm has no CPU kernel")
def test_experts_on_the_device_are_near_those_in_bf16() -> None:
    plain, quantized = both(without_groups(), lambda module: module.cuda())
    assert all(0.005 < off_by(a, b) < 0.13 for a, b in zip(quantized, plain, strict=True))
