"""Routing against Megatron-Core's own functions and against plain torch in float64."""

from typing import Any

import pytest
import torch

from moe_bench.harness.kernels.fused.routing import Choice, route, scores_for_losses
from tests.harness.kernels.fused.references import route_reference

DEEPSEEK = Choice(top_k=8, score="sigmoid", num_groups=8, groups_per_token=4, scale=2.5)
CHOICES = {
    "deepseek_v3": (DEEPSEEK, 64, True),
    "groups_of_no_power_of_two": (
        Choice(top_k=6, score="softmax", is_before=True, num_groups=5, groups_per_token=3, scale=16.0),
        60,
        False,
    ),
    "groups_by_logits": (Choice(top_k=4, score="softmax", num_groups=4, groups_per_token=2), 16, False),
    "softmax_before": (Choice(top_k=8, score="softmax", is_before=True), 48, False),
    "softmax_after": (Choice(top_k=4, score="softmax"), 32, False),
    "sigmoid": (Choice(top_k=3, score="sigmoid", scale=1.5), 12, False),
    "sqrtsoftplus": (Choice(top_k=3, score="sqrtsoftplus", scale=1.5), 24, True),
    "one_sigmoid": (Choice(top_k=1, score="sigmoid"), 16, True),
}


def megatron_core(choice: Choice, logits: torch.Tensor, bias: torch.Tensor | None) -> Any:
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    return topk_routing_with_score_function(
        logits,
        choice.top_k,
        use_pre_softmax=choice.is_before,
        num_groups=choice.num_groups if choice.num_groups > 1 else None,
        group_topk=choice.groups_per_token if choice.num_groups > 1 else None,
        scaling_factor=choice.scale,
        score_function=choice.score,
        expert_bias=bias,
    )


@pytest.mark.parametrize("name", CHOICES)
def test_the_choice_and_the_probabilities_are_megatron_cores(device: str, name: str) -> None:
    choice, num_experts, has_bias = CHOICES[name]
    num_tokens = 33 if device == "cpu" else 4096
    logits = torch.randn(num_tokens, num_experts, device=device)
    bias = torch.randn(num_experts, device=device) if has_bias else None
    probabilities, chosen = route(logits, choice, bias)
    wanted, wanted_map = megatron_core(choice, logits, bias)
    assert torch.equal(chosen, wanted_map)
    torch.testing.assert_close(probabilities, wanted, rtol=2**-20, atol=1e-7)


@pytest.mark.parametrize("name", CHOICES)
def test_probabilities_and_gradients_are_those_of_the_reference_in_float64(device: str, name: str) -> None:
    choice, num_experts, has_bias = CHOICES[name]
    logits = torch.randn(9, num_experts, device=device, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(num_experts, device=device, dtype=torch.float64) if has_bias else None
    found, chosen = route(logits, choice, bias)
    wanted, wanted_map = route_reference(logits, choice, bias)
    assert torch.equal(chosen, wanted_map)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(found)
    found_grad = torch.autograd.grad(found, logits, grad)[0]
    torch.testing.assert_close(
        found_grad, torch.autograd.grad(wanted, logits, grad)[0], rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrtsoftplus"])
def test_scores_for_the_balancing_losses_are_megatron_cores(device: str, score: Any) -> None:
    from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss

    logits = torch.randn(17, 48, device=device, requires_grad=True)
    scores, chosen = scores_for_losses(logits, top_k=4, score=score)
    wanted_map, wanted = compute_routing_scores_for_aux_loss(logits, 4, score)
    assert torch.equal(chosen, wanted_map)
    torch.testing.assert_close(scores, wanted, rtol=2**-20, atol=1e-7)
    grad = torch.randn_like(scores)
    found_grad = torch.autograd.grad(scores, logits, grad)[0]
    torch.testing.assert_close(
        found_grad, torch.autograd.grad(wanted, logits, grad)[0], rtol=2**-16, atol=1e-7
    )


def test_of_equals_the_first_are_chosen(device: str) -> None:
    chosen = route(torch.zeros(2, 8, device=device), Choice(top_k=3, score="softmax"))[1]
    assert chosen.tolist() == [[True] * 3 + [False] * 5] * 2


def test_logits_in_bf16_give_probabilities_in_bf16(device: str) -> None:
    logits = torch.randn(5, 16, device=device).bfloat16()
    probabilities = route(logits, Choice(top_k=2, score="softmax"))[0]
    assert probabilities.dtype == torch.bfloat16
    exact = route_reference(logits.double(), Choice(top_k=2, score="softmax"))[0]
    torch.testing.assert_close(probabilities.double(), exact, rtol=2**-7, atol=1e-6)
