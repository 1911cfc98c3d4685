"""The layer whose experts gather, with our router and permutations, against Megatron-Core's own."""

from functools import partial
from typing import Any

import pytest
import torch

from tests.harness.kernels.configs import small_config
from tests.harness.kernels.fused.layers import moe_layer, trained
from tests.harness.kernels.fused.test_moe_layer import assert_alike


def both(groups: Any, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Megatron-Core's layer on torch's experts, and ours on quack's, whose products are plain torch."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moe_bench.harness.kernels.fused.moe_layer import fused_moe_layer
    from moe_bench.harness.kernels.quack import products
    from moe_bench.harness.kernels.quack.experts import QuackExperts
    from moe_bench.harness.kernels.quack.moe_layer import GatheringMoELayer
    from moe_bench.harness.substitution import Substitution, substituted
    from tests.harness.kernels.quack import plain_interface

    del groups
    ours = partial(fused_moe_layer, GatheringMoELayer, fuses_router=True, fuses_permutation=True)
    config, rank = small_config(**changes), torch.distributed.get_rank()
    with substituted(Substitution(products, "interface", lambda: plain_interface)):
        return (
            trained(moe_layer(MoELayer, config), rank=rank),
            trained(moe_layer(ours, config, experts=QuackExperts), rank=rank),
        )


@pytest.mark.parametrize("top_k", [2, 3])
def test_one_rank_gathers_what_nobody_permuted(top_k: int, groups: Any, host: str) -> None:
    assert_alike(*both(groups, {"moe_router_topk": top_k}))


@pytest.mark.parametrize("top_k", [3])
def test_two_ranks_gather_what_our_kernels_sent(top_k: int, run_ranks: Any, host: str) -> None:
    sizes = {"expert_model_parallel_size": 2}
    for theirs, ours in run_ranks(both, 2, sizes, {"moe_router_topk": top_k, **sizes}):
        assert_alike(theirs, ours)
