"""Inputs go where a case sends them, and loads are what it says."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_bench.harness.layer.inputs import expert_choices, expert_shares, routed_inputs
from moe_bench.harness.layer.weights import draw_weights
from moe_bench.spec.layer_case import LayerCase, LayerRouting
from tests.harness.layer.peers.cases import small_case

CPU = torch.device("cpu")


def case_with(routing: LayerRouting, **changes: Any) -> LayerCase:
    return small_case("qwen3_30b_a3b", precision="bf16", num_tokens=400, **changes).with_routing(routing)


@pytest.mark.parametrize("model", ["deepseek_v3", "gpt_oss_20b", "qwen3_30b_a3b"])
@pytest.mark.parametrize("kind", ["balanced", "random"])
def test_the_logits_choose_what_was_drawn_by_a_margin_that_bf16_cannot_blur(model: str, kind: str) -> None:
    case = small_case(model, precision="bf16", num_tokens=100)
    case = case.with_routing(LayerRouting.model_validate({"kind": kind}))
    weights = draw_weights(case, device="cpu")
    inputs = routed_inputs(case, weights)
    logits = inputs.x.float() @ weights.router.float().t()
    if weights.router_bias is not None:
        logits += weights.router_bias.float()
    best = logits.topk(case.moe.top_k + 1, dim=1)
    assert torch.equal(best.indices[:, :-1].sort(1).values, inputs.choices.sort(1).values)
    assert bool((best.values[:, -2] - best.values[:, -1]).min() > 1.5)
    assert sum(inputs.tokens_per_expert) == case.num_rows


def test_balanced_experts_get_as_many_tokens_each() -> None:
    case = case_with(LayerRouting(kind="balanced"))
    inputs = routed_inputs(case, draw_weights(case, device="cpu"))
    assert set(inputs.tokens_per_expert) == {case.num_rows // case.moe.num_experts}


def test_loads_follow_the_shares_of_a_trace() -> None:
    case = case_with(LayerRouting(kind="random"))
    moe = case.moe.model_copy(update={"top_k": 1})
    shares = tuple(expert % 4 for expert in range(16))
    routing = LayerRouting(kind="trace", shares=shares, source="hand")
    many = case.model_copy(update={"moe": moe, "num_tokens": 24_000}).with_routing(routing)
    choices = expert_choices(many, generator=torch.Generator().manual_seed(1), device=CPU)
    found = torch.bincount(choices.flatten(), minlength=16)
    wanted = torch.tensor(shares) / sum(shares) * 24_000
    assert int(found[wanted == 0].sum()) == 0
    assert torch.allclose(found.double(), wanted.double(), atol=5 * 24_000**0.5 / 4)


def test_the_first_rank_has_the_largest_share_of_a_fair_deal() -> None:
    steep = small_case("qwen3_30b_a3b").model_copy(update={"ep_size": 4})
    steep = steep.with_routing(LayerRouting(kind="power_law", exponent=1.0))
    shares = expert_shares(steep)
    # 16 experts over 4 ranks: the first holds the 1st, 5th, 9th and 13th most popular
    assert shares[:4] == pytest.approx((1, 1 / 5, 1 / 9, 1 / 13))
    per_rank = [sum(shares[rank * 4 : rank * 4 + 4]) for rank in range(4)]
    assert per_rank == sorted(per_rank, reverse=True)
    assert sorted(shares, reverse=True) == pytest.approx([1 / place for place in range(1, 17)])


def test_no_token_chooses_an_expert_twice_or_too_many_groups() -> None:
    case = small_case("deepseek_v3", num_tokens=300).with_routing(
        LayerRouting(kind="power_law", exponent=1.0)
    )
    router, experts = case.moe.router, case.moe.num_experts
    assert router.num_groups is not None
    assert router.groups_per_token is not None
    choices = expert_choices(case, generator=torch.Generator().manual_seed(1), device=CPU)
    groups = choices // (experts // router.num_groups)
    assert all(len(set(row)) == case.moe.top_k for row in choices.tolist())
    assert max(len(set(row)) for row in groups.tolist()) <= router.groups_per_token
