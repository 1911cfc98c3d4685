"""An MoE layer with our permutations against Megatron-Core's own, over every dispatcher and group."""

from typing import Any

import pytest
import torch

from tests.harness.kernels.configs import small_config
from tests.harness.kernels.fused.layers import moe_layer, trained


def both(groups: Any, changes: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What Megatron-Core's dispatcher gives and what ours does, in one rank."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    from moe_bench.harness.kernels.fused.dispatchers import FusedPermutationMoELayer

    rank = torch.distributed.get_rank()
    config = small_config(**changes)
    return tuple(  # type: ignore[return-value]
        trained(moe_layer(layer, groups, config), rank=rank) for layer in (MoELayer, FusedPermutationMoELayer)
    )


def assert_alike(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


CAPACITY = {"moe_expert_capacity_factor": 1.0, "moe_router_load_balancing_type": "none"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"moe_token_dispatcher_type": "allgather"},
        CAPACITY,
        {**CAPACITY, "moe_pad_expert_input_to_capacity": True},
    ],
    ids=["alltoall", "allgather", "dropping", "padding"],
)
def test_one_rank_computes_what_megatron_core_does(changes: dict[str, Any], groups: Any, host: str) -> None:
    assert_alike(*both(groups, changes))


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
def test_two_ranks_compute_what_megatron_core_does(dispatcher: str, run_ranks: Any, host: str) -> None:
    changes = {"moe_token_dispatcher_type": dispatcher, "expert_model_parallel_size": 2}
    for theirs, ours in run_ranks(both, 2, {"expert_model_parallel_size": 2}, changes):
        assert_alike(theirs, ours)


def test_expert_tensor_ranks_compute_what_megatron_core_does(run_ranks: Any, host: str) -> None:
    changes = {"expert_tensor_parallel_size": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True}
    sizes = {"tensor_model_parallel_size": 2, "expert_tensor_parallel_size": 2}
    for theirs, ours in run_ranks(both, 2, sizes, changes):
        assert_alike(theirs, ours)
