"""Groups lie over NVLink domains as Megatron-Core orders ranks, and messages take what their links carry."""

from __future__ import annotations

import pytest

from moe_bench.analysis.collectives import Collective, Group
from moe_bench.projection.fabric import Fabric
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.parallel import ParallelSpec

LOADER = Loader(root=recipes_root(), rules=())
H100 = LOADER.system("h100_sxm")
NVL72 = LOADER.system("gb200_nvl72")

LAYOUT = ParallelSpec(num_gpus=256, tensor=2, pipeline=8, expert=32)
"""TP2 x PP8 x DP16 and EP32 x EDP1, 32 GPUs to a stage."""


@pytest.mark.parametrize(
    ("group", "num_ranks", "ranks_per_domain", "num_domains"),
    [
        (Group.TENSOR, 2, 2, 1),
        (Group.DATA_CONTEXT, 16, 4, 4),  # every second GPU of a node
        (Group.EXPERT, 32, 8, 4),
        (Group.PIPELINE, 8, 1, 8),  # a stage is four nodes
    ],
)
def test_a_group_reaches_over_as_many_nodes_as_its_ranks_are_far_apart(
    group: Group, num_ranks: int, ranks_per_domain: int, num_domains: int
) -> None:
    span = Fabric(H100, LAYOUT).span(group)
    assert (span.num_ranks, span.ranks_per_domain, span.num_domains) == (
        num_ranks,
        ranks_per_domain,
        num_domains,
    )


def test_an_nvl72_rack_holds_the_whole_expert_group() -> None:
    assert Fabric(NVL72, LAYOUT).span(Group.EXPERT).num_domains == 1


def test_an_all_to_all_sends_what_its_node_does_not_hold_over_the_network() -> None:
    time = Fabric(H100, LAYOUT).time(Collective.ALL_TO_ALL, Group.EXPERT, 32e9)
    assert time.nic_s == pytest.approx(24e9 / 50e9)  # 24 of 32 peers
    assert time.nvlink_s == pytest.approx(7e9 / 450e9)  # 7 of 32


def test_a_ring_over_nodes_shares_their_network_cards() -> None:
    time = Fabric(H100, LAYOUT).time(Collective.ALL_GATHER, Group.DATA_CONTEXT, 16e9)
    assert time.nic_s == pytest.approx(16e9 * 3 / 4 / 4 / 50e9)  # three quarters enter a node by four cards
    assert time.nvlink_s == pytest.approx(15e9 / 450e9)


def test_an_all_reduce_moves_twice_what_a_gather_moves() -> None:
    fabric = Fabric(H100, LAYOUT)
    once = fabric.time(Collective.ALL_GATHER, Group.TENSOR, 1e9)
    twice = fabric.time(Collective.ALL_REDUCE, Group.TENSOR, 1e9)
    assert twice.nvlink_s == pytest.approx(2 * once.nvlink_s)


def test_a_group_of_one_takes_no_time() -> None:
    time = Fabric(H100, LAYOUT).time(Collective.ALL_GATHER, Group.CONTEXT, 1e9)
    assert time.nvlink_s == time.nic_s == time.latency_s == 0


def test_dispatch_kernels_use_the_link_that_their_bytes_name() -> None:
    fabric = Fabric(H100, LAYOUT)
    rdma = fabric.time(Collective.RDMA, Group.EXPERT_TENSOR_EXPERT, 5e9)
    nvlink = fabric.time(Collective.NVLINK, Group.EXPERT_TENSOR_EXPERT, 4.5e9)
    assert (rdma.nic_s, rdma.nvlink_s, rdma.is_flex) == (pytest.approx(0.1), 0, True)
    assert (nvlink.nic_s, nvlink.nvlink_s, nvlink.is_flex) == (0, pytest.approx(0.01), True)
