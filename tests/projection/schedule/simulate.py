"""A schedule simulated from its sizes, as tests write them."""

from __future__ import annotations

from collections.abc import Sequence

from moe_bench.projection.schedule.megatron import TransferRule
from moe_bench.projection.schedule.shape import ScheduleKind, ScheduleShape
from moe_bench.projection.schedule.simulation import ChunkTime, simulate_shape
from moe_bench.projection.schedule.timeline import Timeline


def simulate(
    kind: ScheduleKind,
    *,
    num_ranks: int,
    num_virtual: int,
    num_micro_batches: int,
    micro_batch_group_size: int,
    chunks: Sequence[ChunkTime],
    transfer_s: float,
    overlaps_transfer: bool,
) -> Timeline:
    """One step of the schedule `kind`; see `simulate_shape`.

    `overlaps_transfer` is Megatron-Core's `overlap_p2p_comm`, which leaves warm-up and flush blocking. Raises
    ScheduleError where no such schedule exists.
    """
    shape = ScheduleShape(
        kind=kind,
        num_ranks=num_ranks,
        num_virtual=num_virtual,
        num_micro_batches=num_micro_batches,
        group_size=micro_batch_group_size,
    )
    rule = TransferRule(overlaps=overlaps_transfer, waits_for_sends=False)
    return simulate_shape(shape, rule, chunks=chunks, transfer_s=transfer_s)
