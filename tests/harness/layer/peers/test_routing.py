"""The written-out router by hand; Megatron-Core's and transformers' agree with it in test_agreement.py."""

import math
from typing import Any

import pytest
import torch

from moe_bench.harness.layer.peers.routing import Choice, choose
from moe_bench.spec.model import MixtureOfExperts, Router


def chosen(logits: list[float], *, bias: list[float] | None = None, top_k: int = 2, **router: Any) -> Choice:
    moe = MixtureOfExperts(
        num_experts=len(logits), top_k=top_k, expert_ffn_hidden_size=1, router=Router(**router)
    )
    return choose(
        torch.tensor([logits], dtype=torch.float64),
        moe,
        None if bias is None else torch.tensor(bias, dtype=torch.float64),
    )


def weights(*values: float) -> Any:
    return pytest.approx(values, rel=1e-12)


LOG = [math.log(share) for share in (1.0, 4.0, 2.0, 1.0)]
"""Logits whose softmax is 1/8, 4/8, 2/8, 1/8."""


def test_softmax_weighs_the_chosen_by_their_share_of_all() -> None:
    choice = chosen(LOG, score_function="softmax", renormalise=False)
    assert choice.experts.tolist() == [[1, 2]]
    assert choice.probabilities[0].tolist() == weights(4 / 8, 2 / 8)


def test_renormalised_softmax_is_softmax_over_the_chosen() -> None:
    choice = chosen(LOG, score_function="softmax", renormalise=True, scaling_factor=3.0)
    assert choice.probabilities[0].tolist() == weights(3 * 4 / 6, 3 * 2 / 6)


def test_a_balancing_bias_moves_the_choice_and_not_the_weights() -> None:
    # sigmoid(0) = 1/2, sigmoid(-log 3) = 1/4: the bias puts expert 0 before expert 1
    logits = [-math.log(3.0), 0.0, -5.0]
    choice = chosen(
        logits, bias=[0.3, 0.0, 0.0], score_function="sigmoid", renormalise=True, expert_bias=True
    )
    assert choice.experts.tolist() == [[0, 1]]
    assert choice.probabilities[0].tolist() == weights(1 / 3, 2 / 3)


def test_a_token_chooses_within_the_groups_whose_best_scores_sum_highest() -> None:
    # groups (0, 1), (2, 3), (4, 5): the best single score is in the last group, which sums lower
    logits = [2.0, 2.0, 1.0, 1.0, 3.0, -9.0]
    choice = chosen(
        logits, top_k=2, score_function="sigmoid", renormalise=False, num_groups=3, groups_per_token=1
    )
    assert sorted(choice.experts[0].tolist()) == [0, 1]


def test_the_root_of_softplus_is_a_score_too() -> None:
    choice = chosen([0.0, -50.0], top_k=1, score_function="sqrt_softplus", renormalise=False)
    assert choice.probabilities[0].tolist() == weights(math.sqrt(math.log(2.0)))
