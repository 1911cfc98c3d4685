"""Buffers of DeepEP and HybridEP by hand, from the sizes that their sources state."""

from __future__ import annotations

import pytest

from moe_bench.analysis.dispatch_buffers import deepep_buffer_bytes, dispatch_buffer_bytes
from moe_bench.spec.legality.dispatch import DEEPEP_GROUPS
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import HYBRIDEP_DOMAIN, DispatchSpec, Recipe
from tests.analysis.conftest import RecipeMaker

MIB = 2**20


def qwen(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker, dispatcher: str, **changes: object
) -> Recipe:
    """Qwen3-30B-A3B: hidden size 2,048, 128 experts over EP16, nodes of eight, 4,096 tokens per rank."""
    dispatch = DispatchSpec.model_validate({"dispatcher": dispatcher})
    parallel = ParallelSpec(num_gpus=16, expert=16)
    return make_recipe(models["qwen3_30b_a3b"], parallel, dispatch=dispatch, **changes)


def test_deepep_inside_a_node_has_slots_for_256_tokens_per_channel_and_peer() -> None:
    # a slot: the token, where it is from, 128 indices of 8 bytes, 128 weights and 128 scales of 4
    slot = 4096 + 8 + 128 * 8 + 128 * 4 + 128 * 4
    slots = 10 * 8 * (256 * slot + (2 + 3) * 4)
    assert slots % 128 != 0
    assert (
        deepep_buffer_bytes(num_ranks=8, num_sms=20, hidden_bytes=4096) == 32 * MIB + slots // 128 * 128 + 128
    )


def test_deepep_between_nodes_sends_and_receives_beside_it() -> None:
    slot = 4096 + 8 + 128 * 8 + 128 * 4 + 128 * 4
    nvlink = 10 * 8 * (288 * slot + (2 * 2 + 3) * 4)
    # 128 tokens in flight are 7 sendings of 20
    rdma = 2 * 10 * 2 * (140 * (slot + 16) + 4 * (2 * 8 + 2))
    expected = 32 * MIB + sum(-(-part // 128) * 128 for part in (nvlink, rdma))
    assert deepep_buffer_bytes(num_ranks=16, num_sms=20, hidden_bytes=4096) == expected


@pytest.mark.parametrize("num_ranks", sorted(DEEPEP_GROUPS))
def test_every_group_that_check_lets_deepep_have_has_a_size(num_ranks: int) -> None:
    assert deepep_buffer_bytes(num_ranks=num_ranks, num_sms=20, hidden_bytes=4096) > 32 * MIB


def test_twice_the_sms_have_twice_the_channels() -> None:
    few, many = (
        deepep_buffer_bytes(num_ranks=64, num_sms=num_sms, hidden_bytes=4096) for num_sms in (20, 40)
    )
    assert many - 32 * MIB == pytest.approx(2 * (few - 32 * MIB), rel=1e-6)


def test_hybridep_in_one_domain_has_room_for_everyone(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = qwen(models, make_recipe, "hybridep", env={HYBRIDEP_DOMAIN: "16"})
    everyone = 16 * 4096
    rows = everyone * (2 * 2048 + 4 * 128 + 4 * 16)
    flags = 2 * 64 * 16 * 4
    maps = everyone * 128
    assert dispatch_buffer_bytes(recipe) == rows + flags + maps


def test_hybridep_between_domains_keeps_tokens_on_their_way(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    recipe = qwen(models, make_recipe, "hybridep")
    assert recipe.system.nvlink_domain_gpus == 8
    everyone, token, scales = 16 * 4096, 2 * 2048, 4 * 16
    # 64 experts in a domain
    in_domain = everyone * (token + 4 * 64 + scales) + 2 * 64 * 16 * 4 + everyone * 128
    own = 4096 * (token + 4 * 128 + scales)
    other_domain = 4096 * (3 * (token + 4 * 64) + scales) + 4 * (64 + 2) * 8
    assert dispatch_buffer_bytes(recipe) == in_domain + own + other_domain


def test_collectives_need_no_buffers_and_those_of_nccl_ep_are_not_known(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    assert dispatch_buffer_bytes(qwen(models, make_recipe, "alltoall")) == 0
    assert dispatch_buffer_bytes(qwen(models, make_recipe, "allgather")) == 0
    assert dispatch_buffer_bytes(qwen(models, make_recipe, "ncclep")) is None
