"""An MoE layer with our router and permutations against Megatron-Core's own, over dispatchers and groups."""

from functools import partial
from typing import Any

import pytest
import torch

from moe_bench.errors import MissingRequirementError
from tests.harness.kernels.configs import small_config
from tests.harness.kernels.fused.layers import moe_layer, trained


def both(groups: Any, *cases: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What Megatron-Core's layer gives and what ours does, in one rank."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moe_bench.harness.kernels.fused.moe_layer import fused_moe_layer

    del groups
    ours = partial(fused_moe_layer, MoELayer, fuses_router=True, fuses_permutation=True)
    rank = torch.distributed.get_rank()
    return [
        tuple(trained(moe_layer(kind, small_config(**changes)), rank=rank) for kind in (MoELayer, ours))
        for changes in cases
    ]


def assert_alike(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


ALLGATHER = {"moe_token_dispatcher_type": "allgather"}
CAPACITY = {"moe_expert_capacity_factor": 1.0}
DEEPSEEK = {
    "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True,
    "moe_router_num_groups": 4,
    "moe_router_group_topk": 2,
    "moe_router_topk": 4,
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.5,
    "moe_router_dtype": "fp32",
    "moe_shared_expert_intermediate_size": None,
}
SWITCH = {
    "moe_router_pre_softmax": True,
    "moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"],
    "moe_aux_loss_coeff": [0.3, 0.2],
    "moe_z_loss_coeff": 0.1,
}


def test_one_rank_computes_what_megatron_core_does(groups: Any, host: str) -> None:
    cases = (
        {},
        ALLGATHER,
        CAPACITY,
        {**CAPACITY, "moe_pad_expert_input_to_capacity": True},
        DEEPSEEK,
        SWITCH,
    )
    for theirs, ours in both(groups, *cases):
        assert_alike(theirs, ours)


@pytest.mark.slow
def test_balancing_losses_reach_the_routers_weight(groups: Any, host: str) -> None:
    without = {**SWITCH, "moe_aux_loss_coeff": [0.0, 0.0], "moe_z_loss_coeff": None}
    plain, with_losses = (ours["router.weight"] for _, ours in both(groups, without, SWITCH))
    assert not torch.allclose(plain, with_losses, rtol=1e-2)


@pytest.mark.slow
def test_two_expert_ranks_compute_what_megatron_core_does(run_ranks: Any, host: str) -> None:
    sizes = {"expert_model_parallel_size": 2}
    for found in run_ranks(both, 2, sizes, sizes, {**ALLGATHER, **sizes}):
        for theirs, ours in found:
            assert_alike(theirs, ours)


@pytest.mark.slow
def test_two_expert_tensor_ranks_compute_what_megatron_core_does(run_ranks: Any, host: str) -> None:
    sizes = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    for found in run_ranks(both, 2, sizes, {**sizes, "sequence_parallel": True}):
        for theirs, ours in found:
            assert_alike(theirs, ours)


def test_a_router_that_forces_its_choice_keeps_doing_so(groups: Any, host: str) -> None:
    from megatron.core.process_groups_config import ProcessGroupCollection

    from moe_bench.harness.kernels.fused.router import FusedTopKRouter, fuse_router
    from moe_bench.harness.routing import RoundRobinRouter

    router = RoundRobinRouter(
        config=small_config(), pg_collection=ProcessGroupCollection.use_mpu_process_groups()
    )
    fuse_router(router)
    assert isinstance(router, FusedTopKRouter)
    assert router(torch.randn(8, 1, 64))[1].sum(dim=0).tolist() == [2] * 8


def test_what_the_router_kernel_does_not_know_is_refused(groups: Any, host: str) -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moe_bench.harness.kernels.fused.moe_layer import fused_moe_layer

    config = small_config(moe_router_load_balancing_type="sinkhorn", moe_aux_loss_coeff=0.0)
    layer = partial(fused_moe_layer, MoELayer, fuses_router=True, fuses_permutation=False)
    with pytest.raises(MissingRequirementError, match=r"kernels\.fusions\.router: it does not know sinkhorn"):
        moe_layer(layer, config)
