"""Groups lie over NVLink domains as Megatron-Core orders ranks, and messages take what their links carry."""

from __future__ import annotations

import pytest

from moe_bench.analysis.collectives import Collective, Group
from moe_bench.projection.fabric import SWITCH_S, Fabric
from moe_bench.spec.catalogue import recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.system import SystemSpec

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


WIDE = ParallelSpec(num_gpus=4096, expert=1024)
"""DP4096, and EP1024 x EDP4: expert groups of four leaf switches, replicas four leaf switches apart."""


def oversubscribed(*, leaf: float = 1.0, spine: float = 1.0) -> SystemSpec:
    assert H100.fabric is not None
    ratios = {"leaf_oversubscription_ratio": leaf, "spine_oversubscription_ratio": spine}
    return H100.model_copy(update={"fabric": H100.fabric.model_copy(update=ratios)})


@pytest.mark.parametrize(
    ("op", "group", "spine_fraction", "core_fraction"),
    [
        (
            Collective.ALL_TO_ALL,
            Group.EXPERT,
            768 / 1016,
            0.0,
        ),  # three leaves of four, this node's peers aside
        (Collective.ALL_GATHER, Group.DATA_CONTEXT, 1 / 32, 1 / 256),  # an edge per leaf of 32 nodes
        (Collective.ALL_GATHER, Group.EXPERT_DATA, 1.0, 1 / 2),  # every neighbour; two replicas per spine
        (Collective.ALL_GATHER, Group.TENSOR, 0.0, 0.0),
    ],
)
def test_what_passes_a_tier_is_what_has_its_peers_beyond(
    op: Collective, group: Group, spine_fraction: float, core_fraction: float
) -> None:
    tiers = Fabric(H100, WIDE).tiers(op, group)
    assert tiers.spine_fraction == pytest.approx(spine_fraction)
    assert tiers.core_fraction == pytest.approx(core_fraction)


def test_an_oversubscribed_leaf_slows_an_all_to_all_by_the_share_that_passes_it() -> None:
    plain = Fabric(H100, WIDE).time(Collective.ALL_TO_ALL, Group.EXPERT, 1e9)
    tapered = Fabric(oversubscribed(leaf=4), WIDE).time(Collective.ALL_TO_ALL, Group.EXPERT, 1e9)
    assert tapered.nic_s == pytest.approx(plain.nic_s * 4 * 768 / 1016)
    assert tapered.nvlink_s == plain.nvlink_s


def test_rings_placed_without_gaps_bear_a_taper_and_scattered_ones_do_not() -> None:
    plain, tapered = Fabric(H100, WIDE), Fabric(oversubscribed(spine=7), WIDE)
    for group, factor in ((Group.DATA_CONTEXT, 1.0), (Group.EXPERT_DATA, 3.5)):
        expected = factor * plain.time(Collective.ALL_GATHER, group, 1e9).nic_s
        assert tapered.time(Collective.ALL_GATHER, group, 1e9).nic_s == pytest.approx(expected)


def test_switches_of_higher_tiers_cost_latency() -> None:
    inside = Fabric(H100, ParallelSpec(num_gpus=256, expert=256))
    outside = Fabric(H100, ParallelSpec(num_gpus=512, expert=512))
    times = [one.time(Collective.RDMA, Group.EXPERT_TENSOR_EXPERT, 1e6) for one in (inside, outside)]
    assert times[1].latency_s - times[0].latency_s == pytest.approx(2 * SWITCH_S)


def test_a_system_without_tiers_costs_what_its_cards_cost() -> None:
    bare = Fabric(H100.model_copy(update={"fabric": None}), WIDE)
    assert bare.tiers(Collective.ALL_TO_ALL, Group.EXPERT).num_switches == 0


def test_a_reduction_over_a_stage_passes_a_hop_up_and_down_per_doubling_of_nodes() -> None:
    system = Loader(root=recipes_root()).system("h100_sxm")
    seconds = [
        Fabric(system, ParallelSpec(num_gpus=num_gpus, tensor=8, pipeline=4)).stage_reduction_s
        for num_gpus in (32, 64, 256)  # one node for each stage, two, and eight
    ]
    assert seconds == pytest.approx([10e-6, 50e-6, 130e-6])
