"""Routing: exact round robin, and the count of tokens per expert."""

from __future__ import annotations

import functools

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec

from moe_bench.harness.mcore_config import megatron_arguments
from moe_bench.harness.routing import (
    ExpertLoad,
    RoundRobinRouter,
    dealt_experts,
    round_robin_logits,
    use_router,
)
from moe_bench.spec.recipe import Recompute, Routing, RoutingMode
from tests.harness.toys import laid_out, parity_recipe
from tests.harness.zygote import Zygote


def chosen(logits: torch.Tensor, top_k: int) -> list[list[int]]:
    return [sorted(row) for row in logits.topk(top_k).indices.view(-1, top_k).tolist()]


def test_tokens_go_to_experts_in_turn() -> None:
    logits = round_robin_logits(torch.randn(5, 1, 6), top_k=2, num_ranks_before=0)
    assert chosen(logits, 2) == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]


def test_a_turn_wraps_around_the_last_expert() -> None:
    assert chosen(round_robin_logits(torch.randn(2, 2, 4), top_k=3, num_ranks_before=0), 3) == [
        [0, 1, 2],
        [0, 1, 3],
        [0, 2, 3],
        [1, 2, 3],
    ]


def test_a_rank_goes_on_where_the_rank_before_it_ends() -> None:
    """5 tokens with 2 choices on each of 3 ranks: 30 choices of 6 experts are 5 for each."""
    ranks = [
        chosen(round_robin_logits(torch.randn(5, 1, 6), top_k=2, num_ranks_before=rank), 2)
        for rank in range(3)
    ]
    assert [rank[0] for rank in ranks] == [[0, 1], [4, 5], [2, 3]]
    choices = [expert for rank in ranks for token in rank for expert in token]
    assert sorted(choices) == [expert for expert in range(6) for _ in range(5)]


def test_the_gate_gets_the_gradient_of_the_logits_that_replaced_its_own() -> None:
    logits = torch.randn(4, 1, 4, requires_grad=True)
    gradient = torch.randn(4, 1, 4)
    round_robin_logits(logits, top_k=2, num_ranks_before=1).backward(gradient)
    assert logits.grad is not None
    assert torch.equal(logits.grad, gradient)


def test_a_router_is_set_wherever_a_spec_hides_expert_layers() -> None:
    in_spec, in_partial = MoESubmodules(experts=object), MoESubmodules(experts=object)
    block = [
        ModuleSpec(module=torch.nn.Module, submodules={"not searched": None}),
        ModuleSpec(module=torch.nn.Module, submodules=in_spec),
        functools.partial(torch.nn.Module, submodules=in_partial),
    ]
    assert in_spec.router is in_partial.router is TopKRouter
    use_router((block, None), RoundRobinRouter)
    assert in_spec.router is in_partial.router is RoundRobinRouter


def test_a_layer_is_named_by_its_kind_and_number() -> None:
    load = functools.partial(ExpertLoad, tokens_per_step=())
    assert load(layer=3, is_mtp=False).name == "decoder.3"
    assert load(layer=0, is_mtp=True).name == "mtp.0"


@pytest.mark.parametrize("structure", ["deepseek_v3", "gpt_oss_20b"])
def test_round_robin_loads_every_expert_equally_through_groups_and_bias(
    zygote: Zygote, structure: str
) -> None:
    recipe = laid_out(
        parity_recipe(structure),
        parallel={"num_gpus": 4, "pipeline": 2, "expert": 2},
        routing=Routing(mode="round_robin"),
    )
    counts = zygote.train(megatron_arguments(recipe)).samples.tokens_per_expert
    num_layers = 3 + 1 if structure == "deepseek_v3" else 4
    share = recipe.tokens_per_step * 2 // 8
    assert counts == (((share,) * 8,) * num_layers,) * recipe.steps.num_timed


def test_ranks_whose_choices_the_experts_do_not_divide_load_them_equally_together(zygote: Zygote) -> None:
    recipe = laid_out(
        parity_recipe("qwen3_30b_a3b").model_copy(update={"seq_len": 30}),
        parallel={"num_gpus": 2, "expert": 2},
        routing=Routing(mode="round_robin"),
    )
    # 60 choices of 8 experts on a rank
    assert recipe.seq_len * 2 % 8
    counts = zygote.train(megatron_arguments(recipe)).samples.tokens_per_expert
    assert counts == (((recipe.tokens_per_step * 2 // 8,) * 8,) * 4,) * recipe.steps.num_timed


@pytest.mark.parametrize("mode", ["natural", "random_logits", "biased"])
def test_every_token_copy_is_counted_once_over_all_ranks(zygote: Zygote, mode: RoutingMode) -> None:
    recipe = laid_out(
        parity_recipe("qwen3_30b_a3b"),
        parallel={
            "num_gpus": 4,
            "tensor": 2,
            "sequence_parallel": True,
            "context": 2,
            "context_comm": "allgather",
        },
        routing=Routing(mode=mode, bias_std=1.0 if mode == "biased" else 0.0),
        recompute=Recompute(granularity="full", method="uniform", num_layers=1),
    )
    counts = zygote.train(megatron_arguments(recipe)).samples.tokens_per_expert
    assert [[sum(layer) for layer in step] for step in counts] == [[recipe.tokens_per_step * 2] * 4] * 5
    assert any(max(layer) > min(layer) for step in counts for layer in step)


def test_a_recording_is_dealt_so_that_no_token_takes_an_expert_twice() -> None:
    counts = (4, 2, 1, 1)
    chosen = dealt_experts(counts, top_k=2)
    # four tokens: the list 0 0 0 0 1 1 2 3 is laid in two columns
    assert chosen.tolist() == [[0, 1], [0, 1], [0, 2], [0, 3]]
    assert chosen.flatten().bincount().tolist() == list(counts)
