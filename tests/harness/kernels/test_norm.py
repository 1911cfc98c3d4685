"""Norms against formulas in float64, alone and with the heads over two ranks."""

from typing import Any

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.norm import LayerNorm, RMSNorm, WholeVectorRMSNorm, norm
from moe_bench.harness.kernels.provider import KernelChoice
from tests.harness.kernels.configs import small_config
from tests.harness.kernels.models import replicated_gradients
from tests.harness.kernels.ranks import Groups, without_groups
from tests.harness.kernels.references import rms_norm_reference

EPS = 1e-5


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_parameters_are_marked_where_the_sequence_is_split(sequence_parallel: bool) -> None:
    parallel = {"sequence_parallel": sequence_parallel, "tensor_model_parallel_size": 2}
    for normalization in ("RMSNorm", "LayerNorm"):
        module = norm(config=small_config(normalization=normalization, **parallel), hidden_size=8, eps=EPS)
        assert [parameter.sequence_parallel for parameter in module.parameters()] == [
            sequence_parallel
        ] * len(list(module.parameters()))


def test_the_configuration_names_the_norm() -> None:
    assert isinstance(norm(config=small_config(), hidden_size=8, eps=EPS), RMSNorm)
    layer_norm = norm(config=small_config(normalization="LayerNorm"), hidden_size=8, eps=EPS)
    assert isinstance(layer_norm, LayerNorm)


def test_an_unknown_norm_is_refused() -> None:
    with pytest.raises(MissingRequirementError, match="zero_centered"):
        norm(config=small_config(layernorm_zero_centered_gamma=True), hidden_size=8, eps=EPS)


@pytest.mark.usefixtures("each_device")
def test_rms_norm_equals_its_formula_with_gradients() -> None:
    module = norm(config=small_config(), hidden_size=8, eps=EPS).double()
    module.weight.data.normal_()
    x, grad = torch.randn(5, 8, dtype=torch.float64, requires_grad=True), torch.randn(5, 8)
    module(x).backward(grad.double())
    exact, weight = x.detach().requires_grad_(), module.weight.detach().requires_grad_()
    rms_norm_reference(exact, weight, EPS).backward(grad.double())
    torch.testing.assert_close(x.grad, exact.grad)
    torch.testing.assert_close(module.weight.grad, weight.grad)


def whole_vector_norm(groups: Groups, x: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor) -> Any:
    """Output and gradients of this rank's heads, and the gradient of the whole weight."""
    module = WholeVectorRMSNorm(
        config=small_config(), hidden_size=x.shape[-1], eps=EPS, num_heads=4, tp_group=groups.tp
    ).double()
    module.weight.data = weight
    mine = x.chunk(groups.tp.size(), dim=2)[groups.tp.rank()].clone().requires_grad_()
    output = module(mine)
    output.backward(grad.chunk(groups.tp.size(), dim=2)[groups.tp.rank()])
    return output.detach(), mine.grad, module.weight.grad


@pytest.mark.parametrize("tp_size", [1, 2])
def test_a_norm_over_all_heads_equals_its_formula_on_any_number_of_ranks(
    tp_size: int, run_ranks: Any
) -> None:
    x, grad = (torch.randn(3, 2, 4, 8, dtype=torch.float64) for _ in range(2))
    weight = torch.randn(32, dtype=torch.float64)
    ranks = run_ranks(whole_vector_norm, tp_size, {"tensor_model_parallel_size": tp_size}, x, weight, grad)
    exact, exact_weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = rms_norm_reference(exact.flatten(2), exact_weight, EPS).view_as(x)
    expected.backward(grad)
    torch.testing.assert_close(torch.cat([rank[0] for rank in ranks], dim=2), expected)
    torch.testing.assert_close(torch.cat([rank[1] for rank in ranks], dim=2), exact.grad)
    # Megatron-Core's finalize_model_grads sums what the ranks have.
    torch.testing.assert_close(sum(rank[2] for rank in ranks), exact_weight.grad)


def test_a_model_with_norms_over_all_heads_has_the_same_gradients_on_two_ranks(run_ranks: Any) -> None:
    """Megatron-Core itself puts the slices of the norms' gradients together."""
    changes = {"qk_layernorm": True}
    choice = KernelChoice(family="torch_native", device_type="cpu", qk_norm="whole_vector")
    (whole,) = run_ranks(replicated_gradients, 1, {}, changes, choice)
    assert sum("q_layernorm" in name or "k_layernorm" in name for name in whole) == 8
    for rank in run_ranks(replicated_gradients, 2, {"tensor_model_parallel_size": 2}, changes, choice):
        assert rank.keys() == whole.keys()
        for name, gradient in rank.items():
            torch.testing.assert_close(gradient, whole[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_norm_over_all_heads_is_not_the_norm_of_each_head() -> None:
    module = WholeVectorRMSNorm(
        config=small_config(), hidden_size=8, eps=EPS, num_heads=2, tp_group=without_groups().tp
    )
    x = torch.cat([torch.ones(1, 1, 1, 8), 3 * torch.ones(1, 1, 1, 8)], dim=2)
    assert module(x)[0, 0, :, 0].tolist() == pytest.approx([5**-0.5, 3 * 5**-0.5], rel=1e-5)


def test_heads_that_the_ranks_do_not_divide_are_refused() -> None:
    with pytest.raises(MissingRequirementError, match="all 3 heads"):
        WholeVectorRMSNorm(
            config=small_config(), hidden_size=8, eps=EPS, num_heads=3, tp_group=without_groups(tp=2).tp
        )
