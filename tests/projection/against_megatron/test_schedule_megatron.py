"""Order of work, transfers and waits against Megatron-Core's own functions."""

import itertools
from collections.abc import Iterable
from types import SimpleNamespace

import pytest
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches, get_schedule_table
from megatron.core.transformer.cuda_graphs import convert_schedule_table_to_order

from moe_bench.projection.schedule.megatron import (
    num_warm_up_passes,
    rank_order,
    rank_program,
    schedule_table,
)
from moe_bench.projection.schedule.program import Compute, Post, Tensor, Wait, links_of
from moe_bench.projection.schedule.shape import Pass, PassKind
from moe_bench.projection.schedule.simulation import ScheduleKind, ScheduleShape, TransferRule
from tests.projection.against_megatron.recorded import recorded

SIZES = [
    (num_ranks, num_virtual, num_micro_batches, group_size)
    for num_ranks, num_virtual in ((2, 2), (2, 5), (4, 3), (8, 4))
    for group_size in (num_ranks, num_ranks + 3)
    for num_micro_batches in (group_size, 2 * group_size, 3 * group_size + num_ranks)
    if num_micro_batches % group_size == 0 or num_micro_batches % group_size >= num_ranks
]
"""With last groups that are full and not, and schedules that are all warm-up."""
KINDS = (ScheduleKind.INTERLEAVED, ScheduleKind.INTERLEAVED_EP_OVERLAP)


def shape_of(kind: ScheduleKind, sizes: tuple[int, int, int, int]) -> ScheduleShape:
    num_ranks, num_virtual, num_micro_batches, group_size = sizes
    return ScheduleShape(
        kind=kind,
        num_ranks=num_ranks,
        num_virtual=num_virtual,
        num_micro_batches=num_micro_batches,
        group_size=group_size,
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_the_table_of_passes_is_megatrons(sizes: tuple[int, int, int, int]) -> None:
    _, num_virtual, num_micro_batches, group_size = sizes
    expected = get_schedule_table(num_micro_batches, num_virtual, group_size)
    assert list(schedule_table(shape_of(ScheduleKind.INTERLEAVED, sizes))) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", SIZES)
def test_warm_up_and_order_are_megatrons(kind: ScheduleKind, sizes: tuple[int, int, int, int]) -> None:
    num_ranks, num_virtual, num_micro_batches, group_size = sizes
    shape = shape_of(kind, sizes)
    table = get_schedule_table(num_micro_batches, num_virtual, group_size)
    for rank in range(num_ranks):
        _, _, num_warm_up, _ = get_pp_rank_microbatches(
            num_micro_batches,
            num_virtual,
            group_size,
            overlap_moe_expert_parallel_comm=kind is ScheduleKind.INTERLEAVED_EP_OVERLAP,
            p2p_communicator=communicator(rank, num_ranks, num_virtual),
        )
        assert num_warm_up_passes(shape, rank) == num_warm_up
        passes = itertools.chain(*rank_order(shape, rank))
        signed = [(one.chunk // num_ranks + 1) * (1 if one.kind == "F" else -1) for one in passes]
        assert signed == convert_schedule_table_to_order(num_warm_up, num_virtual, table)


def communicator(rank: int, num_ranks: int, num_virtual: int) -> object:
    return SimpleNamespace(
        pp_group=SimpleNamespace(rank=lambda: rank, size=lambda: num_ranks),
        virtual_pipeline_model_parallel_size=num_virtual,
    )


RULES = [
    TransferRule(overlaps=overlaps, waits_for_sends=waits)
    for overlaps, waits in ((False, False), (True, False), (True, True))
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.overlaps}-{rule.waits_for_sends}")
@pytest.mark.parametrize("sizes", SIZES)
def test_an_interleaved_rank_posts_and_waits_where_megatron_does(
    kind: ScheduleKind, rule: TransferRule, sizes: tuple[int, int, int, int]
) -> None:
    require_equal_events(shape_of(kind, sizes), rule)


@pytest.mark.parametrize(
    ("num_ranks", "num_micro_batches"), [(2, 1), (2, 7), (4, 2), (4, 4), (4, 9), (8, 20)]
)
def test_a_1f1b_rank_posts_and_waits_where_megatron_does(num_ranks: int, num_micro_batches: int) -> None:
    shape = shape_of(ScheduleKind.ONE_F_ONE_B, (num_ranks, 1, num_micro_batches, num_ranks))
    require_equal_events(shape, TransferRule(overlaps=False, waits_for_sends=False))


def require_equal_events(shape: ScheduleShape, rule: TransferRule) -> None:
    for rank, events in enumerate(recorded(shape, rule)):
        expected = [(event.work, set(event.sends), set(event.receives), event.awaited) for event in events]
        assert events_of(shape, rule, rank) == expected, f"rank {rank}"
        awaited: set[object] = set()
        for event in events:  # the links deliver what the passes read, and not too late
            awaited |= event.awaited
            reads = {named(tensor) for one in event.work if (tensor := read_by(shape, one)) is not None}
            assert set(event.reads) == reads
            assert reads <= awaited


def events_of(shape: ScheduleShape, rule: TransferRule, rank: int) -> list[tuple[object, ...]]:
    """Our program as the recorder would write it down."""
    events: list[tuple[object, ...]] = []
    ever, newly = set[Tensor](), set[Tensor]()

    def write(work: object, sends: Iterable[Tensor], receives: Iterable[Tensor]) -> None:
        awaited = frozenset(map(named, newly))
        events.append((work, set(map(named, sends)), set(map(named, receives)), awaited))
        ever.update(newly)
        newly.clear()

    for instruction in rank_program(shape, rank, rule):
        match instruction:
            case Wait(tensors=tensors):
                newly.update(set(tensors) - ever)
            case Post(sends=sends, receives=receives) if sends + receives:
                write((), sends, receives)
            case Compute(work=work):
                newly.update(
                    {tensor for one in work if (tensor := links_of(shape).tensor_read(one)) is not None}
                    - ever
                )
                write(tuple((str(one.kind), one.chunk, one.micro_batch) for one in work), (), ())
    return events


def named(tensor: Tensor) -> tuple[str, int, int]:
    return ("F" if tensor.is_activation else "B", tensor.chunk, tensor.micro_batch)


def read_by(shape: ScheduleShape, name: tuple[str, int, int]) -> Tensor | None:
    kind, chunk, micro_batch = name
    return links_of(shape).tensor_read(Pass(PassKind(kind), chunk, micro_batch))
