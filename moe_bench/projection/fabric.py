"""Where the ranks of a process group stand, and how long a message of theirs takes at full link speed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from moe_bench.analysis.collectives import Collective, Group, group_size
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.system import FabricSpec, SystemSpec

NVLINK_LATENCY_S = 10e-6
"""Start of an NCCL collective inside an NVLink domain: 5 to 9 us per rank plus some 20 us in one node."""
RING_HOP_S = 20e-6
"""Per further domain of a ring: what the bandwidth of small messages over many nodes comes to."""
FLEX_NVLINK_LATENCY_S = 40e-6
FLEX_RDMA_LATENCY_S = 120e-6
"""Start of a DeepEP or HybridEP kernel with the host's part of it (20 to 60 us inside a domain, 100 to 250 us
across: the distance between kernel and torch times in deepseek-ai/DeepEP, Hybrid-EP_Implementation.md)."""

SWITCH_S = 0.5e-6
"""Per switch beyond a leaf switch, cables included: a Quantum-2 switch forwards in 0.15 to 0.33 us, the rest
is fibre. A message passes one inside a leaf's reach, three through the spine, five through the core."""

_FLEX = (Collective.NVLINK, Collective.RDMA)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """How a group lies over NVLink domains."""

    num_ranks: int
    ranks_per_domain: int
    num_domains: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    """What of a group's traffic between NVLink domains passes each tier of switches."""

    spine_fraction: float
    """Share of its bytes that leave the reach of their leaf switches."""
    core_fraction: float
    """Share that leaves the reach of the spine, too."""

    @property
    def num_switches(self) -> int:
        """That the furthest message passes beyond its leaf switch."""
        return 2 * (self.spine_fraction > 0) + 2 * (self.core_fraction > 0)

    def slowdown(self, fabric: FabricSpec) -> float:
        """By how much oversubscribed links upwards hold the traffic back: all ranks send at once, so a tier
        that carries the share s of it with 1 / r of the bandwidth takes s r times as long as the cards.
        """
        spine_ratio = fabric.leaf_oversubscription_ratio
        core_ratio = spine_ratio * fabric.spine_oversubscription_ratio
        return max(1.0, self.spine_fraction * spine_ratio, self.core_fraction * core_ratio)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkTime:
    """Seconds of one message at datasheet bandwidth; both links work at once."""

    nvlink_s: float
    nic_s: float
    latency_s: float
    is_flex: bool = False

    def beside(self, other: LinkTime) -> LinkTime:
        """Both as one, each link carrying what either puts on it and the later start counting."""
        return LinkTime(
            nvlink_s=self.nvlink_s + other.nvlink_s,
            nic_s=self.nic_s + other.nic_s,
            latency_s=max(self.latency_s, other.latency_s),
            is_flex=self.is_flex,
        )


@dataclass(frozen=True)
class Fabric:
    """The links between the ranks of one job.

    Ranks are placed as Megatron-Core orders them: tensor, context, expert and data parallel neighbours first,
    pipeline stages furthest apart (parallel_state.py, `tp-cp-ep-dp-pp`).
    """

    system: SystemSpec
    parallel: ParallelSpec

    @cached_property
    def domain_ranks(self) -> int:
        """Ranks of an NVLink domain that groups can fill: the largest power of two (64 of an NVL72 rack)."""
        return 1 << (self.system.nvlink_domain_gpus.bit_length() - 1)

    def span(self, group: Group) -> Span:
        """How `group` lies over NVLink domains."""
        num_ranks = self._num_ranks(group)
        per_domain = max(1, min(num_ranks, self.domain_ranks // self._stride(group)))
        return Span(num_ranks=num_ranks, ranks_per_domain=per_domain, num_domains=-(-num_ranks // per_domain))

    @property
    def stage_reduction_s(self) -> float:
        """A few numbers reduced over all ranks of a pipeline stage, which stand side by side: NCCL's tree,
        one hop up and one down for every doubling of the domains.
        """
        num_domains = max(1.0, self.parallel.num_gpus / self.parallel.pipeline / self.domain_ranks)
        return NVLINK_LATENCY_S + 2 * RING_HOP_S * math.log2(num_domains)

    def time(self, op: Collective, group: Group, num_bytes: float) -> LinkTime:
        """One collective of `num_bytes`, counted as `analysis/collectives.py` does.

        Ring: every byte that leaves a rank passes NVLink, and B (N - 1) / N of a domain's B bytes pass the g
        NICs of its members. Message to a neighbour: of n - 1 neighbours in a row, N - 1 are across. All-to-
        all: the share of the peers in reach passes NVLink, the rest each rank's own NIC.
        """
        nvlink, nic = self._bytes(op, group, num_bytes)
        crosses = nic > 0
        tiers = self.tiers(op, group)
        if self.system.fabric is not None:
            nic *= tiers.slowdown(self.system.fabric)
        if op in _FLEX:
            latency = FLEX_RDMA_LATENCY_S if crosses else FLEX_NVLINK_LATENCY_S
        else:
            latency = NVLINK_LATENCY_S + RING_HOP_S * (self.span(group).num_domains - 1) * crosses
        latency += SWITCH_S * tiers.num_switches * crosses * self._num_crossings(op, group)
        gpu = self.system.gpu
        nvlink_rate = gpu.nvlink_bytes_per_s if gpu is not None else float("inf")
        nic_rate = self.system.nic_bytes_per_s or float("inf")
        return LinkTime(
            nvlink_s=nvlink / nvlink_rate,
            nic_s=nic / nic_rate,
            latency_s=latency if nvlink or nic else 0.0,
            is_flex=op in _FLEX,
        )

    def tiers(self, op: Collective, group: Group) -> Tiers:
        """Which share of the traffic between domains passes the spine and the core, jobs placed without gaps.

        All-to-all: the share of the peers outside. Ring or row: one edge in as many as a leaf has domains of
        the group, which is every edge where neighbours are further apart than a leaf reaches.
        """
        fabric = self.system.fabric
        if fabric is None:
            return Tiers(spine_fraction=0.0, core_fraction=0.0)
        return Tiers(
            spine_fraction=self._share_beyond(op, group, fabric.leaf_domains),
            core_fraction=self._share_beyond(op, group, fabric.spine_domains),
        )

    def _share_beyond(self, op: Collective, group: Group, num_domains: int) -> float:
        span = self.span(group)
        within = max(
            span.ranks_per_domain,
            min(span.num_ranks, num_domains * self.domain_ranks // self._stride(group)),
        )
        if within >= span.num_ranks:
            return 0.0
        if op is Collective.ALL_TO_ALL or op in _FLEX:
            return (span.num_ranks - within) / (span.num_ranks - span.ranks_per_domain)
        return span.ranks_per_domain / within

    def _num_crossings(self, op: Collective, group: Group) -> int:
        """How many messages, one after the other, pass the spine or the core: a ring's crossing edges."""
        if op is Collective.ALL_TO_ALL or op is Collective.SEND or op in _FLEX:
            return 1
        return math.ceil(self.tiers(op, group).spine_fraction * self.span(group).num_domains)

    def _bytes(self, op: Collective, group: Group, num_bytes: float) -> tuple[float, float]:
        """Bytes that one rank puts on NVLink and on its NIC."""
        if op is Collective.NVLINK:
            return num_bytes, 0.0
        if op is Collective.RDMA:
            return 0.0, num_bytes
        span = self.span(group)
        if op is Collective.RECV or span.num_ranks == 1:
            return 0.0, 0.0
        if op is Collective.SEND:
            crossing = (span.num_domains - 1) / (span.num_ranks - 1)
            return num_bytes * (1 - crossing), num_bytes * crossing
        ranks, here = span.num_ranks, span.ranks_per_domain
        if op is Collective.ALL_TO_ALL:
            return num_bytes * (here - 1) / ranks, num_bytes * (ranks - here) / ranks
        rounds = 2 if op is Collective.ALL_REDUCE else 1
        crossing = (span.num_domains - 1) / span.num_domains / here
        return rounds * num_bytes * (ranks - 1) / ranks, rounds * num_bytes * crossing

    def _num_ranks(self, group: Group) -> int:
        if group is Group.EMBEDDING:
            return min(2, self.parallel.pipeline)
        return group_size(self.parallel, group)

    def _stride(self, group: Group) -> int:
        """Distance between neighbours of the group, in ranks."""
        parallel = self.parallel
        per_stage = parallel.num_gpus // parallel.pipeline
        expert = parallel.expert_tensor * parallel.expert
        instances = parallel.num_optimizer_instances
        return {
            Group.CONTEXT: parallel.tensor,
            Group.DATA_CONTEXT: parallel.tensor,
            Group.EXPERT: parallel.expert_tensor,
            Group.EXPERT_DATA: expert,
            Group.PIPELINE: per_stage,
            Group.EMBEDDING: per_stage,
            Group.INSTANCES: max(1, per_stage // instances),
        }.get(group, 1)
