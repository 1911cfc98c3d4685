"""quack's experts with its products in plain torch: a float64 loop says what is right."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from moe_bench.harness.kernels.quack import products
from moe_bench.harness.kernels.quack.experts import QuackExperts
from moe_bench.harness.kernels.quack.rows import rows_of_routing_map
from moe_bench.harness.substitution import Substitution, substituted
from tests.harness.kernels.configs import gpt_oss_experts, small_config
from tests.harness.kernels.quack import plain_interface
from tests.harness.kernels.ranks import Groups, without_groups
from tests.harness.kernels.references import experts_reference
from tests.harness.kernels.test_expert_checkpoint import written

COUNTS = [5, 0, 9, 2]
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
"""quack's epilogue takes probabilities in FP32 and returns their gradient in FP32; all else is FP64 here."""


@pytest.fixture(autouse=True)
def _plain_products() -> Iterator[None]:
    with substituted(Substitution(products, "interface", lambda: plain_interface)):
        yield


def experts(groups: Groups, *, accumulates: bool = False, **changes: Any) -> QuackExperts:
    config = small_config(num_moe_experts=4, params_dtype=torch.float64, **changes)
    module = QuackExperts(4, config, pg_collection=groups, accumulates=accumulates)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module


def exact_weights(module: QuackExperts) -> dict[str, torch.Tensor]:
    return {name: values.detach().clone().requires_grad_() for name, values in module.named_parameters()}


def test_rows_as_they_come_equal_a_loop_over_tokens(groups: Groups) -> None:
    module = experts(groups)
    x = torch.randn(sum(COUNTS), 64, dtype=torch.float64, requires_grad=True)
    probabilities = torch.rand(sum(COUNTS), dtype=torch.float64, requires_grad=True)
    grad = torch.randn(sum(COUNTS), 64, dtype=torch.float64)
    output, bias = module(x, torch.tensor(COUNTS), probabilities)
    output.backward(grad)
    weights = exact_weights(module)
    exact = [tensor.detach().clone().requires_grad_() for tensor in (x, probabilities)]
    expected = experts_reference(exact[0], COUNTS, exact[1], weights)
    expected.backward(grad)
    assert bias is None
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(x.grad, exact[0].grad, **CLOSE)
    torch.testing.assert_close(probabilities.grad, exact[1].grad, **CLOSE)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, **CLOSE)


def routed(num_tokens: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A routing map of four experts, of which the second gets nothing, and probabilities."""
    scores = torch.rand(num_tokens, 4)
    scores[:, 1] = -1.0
    chosen = scores.topk(top_k, dim=1).indices
    routing_map = torch.zeros(num_tokens, 4, dtype=torch.bool).scatter_(1, chosen, True)
    return routing_map, torch.rand(num_tokens, 4, dtype=torch.float64) * routing_map


@pytest.mark.parametrize("top_k", [1, 3])
def test_gathered_tokens_equal_a_sum_over_their_experts(top_k: int, groups: Groups) -> None:
    module = experts(groups)
    routing_map, dense = routed(10, top_k)
    dense.requires_grad_()
    x = torch.randn(10, 64, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(10, 64, dtype=torch.float64)
    rows, probabilities = rows_of_routing_map(routing_map, dense, top_k=top_k)
    output, _ = module(x, rows, probabilities)
    output.backward(grad)

    weights = exact_weights(module)
    exact_x, exact_dense = (tensor.detach().clone().requires_grad_() for tensor in (x, dense))
    expert, token = routing_map.t().nonzero(as_tuple=True)
    counts = routing_map.sum(dim=0).tolist()
    expected_rows = experts_reference(exact_x[token], counts, exact_dense[token, expert], weights)
    expected = torch.zeros_like(exact_x).index_add(0, token, expected_rows)
    expected.backward(grad)
    torch.testing.assert_close(output, expected, **CLOSE)
    torch.testing.assert_close(x.grad, exact_x.grad, **CLOSE)
    torch.testing.assert_close(dense.grad, exact_dense.grad, **CLOSE)
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, weights[name].grad, **CLOSE)


def test_only_tokens_pre_activation_and_integers_are_kept(groups: Groups) -> None:
    module = experts(groups)
    routing_map, dense = routed(10, 3)
    rows, probabilities = rows_of_routing_map(routing_map, dense.requires_grad_(), top_k=3)
    x = torch.randn(10, 64, dtype=torch.float64, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        module(x, rows, probabilities)
    weights = sum(parameter.numel() for parameter in module.parameters())
    ffn, num_rows = 32, 30
    integers = (4 + 1) + num_rows + num_rows
    assert sum(kept.values()) - weights == x.numel() + num_rows * 2 * ffn + num_rows + integers


def test_a_rank_without_tokens_gives_every_parameter_zeros(groups: Groups) -> None:
    module = experts(groups)
    x = torch.randn(0, 64, dtype=torch.float64, requires_grad=True)
    output, _ = module(x, torch.zeros(4, dtype=torch.long), torch.rand(0, dtype=torch.float64))
    output.sum().backward()
    assert output.shape == (0, 64)
    assert not any(parameter.grad.any() for parameter in module.parameters())


def test_weight_gradients_are_added_to_the_buffer_where_that_is_asked_for(groups: Groups) -> None:
    separate, added = experts(groups), experts(groups, accumulates=True)
    added.load_state_dict(separate.state_dict())
    for parameter in added.parameters():
        parameter.main_grad = torch.ones_like(parameter, dtype=torch.float32)
        parameter.grad_added_to_main_grad = False
    x, counts, probabilities = torch.randn(16, 64).double(), torch.tensor(COUNTS), torch.rand(16).double()
    for module in (separate, added):
        module(x, counts, probabilities)[0].square().sum().backward()
    for mine, truth in zip(added.parameters(), separate.parameters(), strict=True):
        assert mine.grad_added_to_main_grad
        torch.testing.assert_close(mine.main_grad - 1.0, truth.grad.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (gpt_oss_experts(), "biases"),
        ({**gpt_oss_experts(), "add_bias_linear": False}, "gated by SiLU"),
        ({"activation_func_clamp_value": 7.0}, "without offset or clamp"),
        ({"moe_ffn_hidden_size": 36}, "expert width 36, not a multiple of 8"),
    ],
    ids=["biases", "quick GELU", "clamp", "width"],
)
def test_what_quack_lacks_is_refused(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(MissingRequirementError, match=problem):
        experts(without_groups(), **changes)


def test_the_checkpoint_is_that_of_one_module_per_expert(groups: Groups) -> None:
    module = experts(groups)
    tensors = written(module)
    assert {
        key.removeprefix("mlp.experts.experts."): tuple(whole.shape) for key, (whole, _) in tensors.items()
    } == {
        "linear_fc1.weight": (3, 4, 64, 64),
        "linear_fc2.weight": (3, 4, 64, 32),
    }
    for name, parameter in module.named_parameters():
        stored, _ = tensors[f"mlp.experts.experts.{name}"]
        torch.testing.assert_close(stored[1].double(), parameter.detach(), rtol=1e-6, atol=1e-6)
