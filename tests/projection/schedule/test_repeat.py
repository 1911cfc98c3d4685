"""Leaving out periods of the steady state changes nothing."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bench.projection.schedule import simulation as schedule
from moe_bench.projection.schedule.graph import orders
from moe_bench.projection.schedule.repeat import shorter_shapes, steady_cut
from moe_bench.projection.schedule.simulation import (
    ChunkTime,
    ScheduleKind,
    ScheduleShape,
    Timeline,
    TransferRule,
)
from tests.projection.schedule.simulate import simulate

TIMES_S = st.floats(min_value=0.01, max_value=1.0)


@st.composite
def long_schedules(draw: st.DrawFn) -> tuple[ScheduleShape, TransferRule]:
    kind = draw(st.sampled_from([one for one in ScheduleKind if one is not ScheduleKind.NO_PIPELINE]))
    interleaves = kind in (ScheduleKind.INTERLEAVED, ScheduleKind.INTERLEAVED_EP_OVERLAP)
    num_ranks = draw(st.integers(2, 5))
    num_virtual = draw(st.integers(2, 4)) if interleaves else 2 if kind.has_v_placement else 1
    group_size = num_ranks + draw(st.integers(0, 2))
    num_micro_batches = draw(st.integers(12, 30)) * (group_size if interleaves else num_ranks)
    if interleaves:
        num_micro_batches += draw(st.sampled_from([0, *range(num_ranks, group_size)]))
    shape = ScheduleShape(
        kind=kind,
        num_ranks=num_ranks,
        num_virtual=num_virtual,
        num_micro_batches=num_micro_batches,
        group_size=group_size,
    )
    overlaps = draw(st.sampled_from(kind.overlap_choices))
    return shape, TransferRule(overlaps=overlaps, waits_for_sends=draw(st.booleans()))


def random_chunks(draw: st.DrawFn, num_chunks: int) -> list[ChunkTime]:
    def one() -> ChunkTime:
        forward_s, dgrad_s, wgrad_s = draw(TIMES_S), draw(TIMES_S), draw(TIMES_S)
        joint_s = (forward_s + dgrad_s + wgrad_s) * draw(st.floats(0.6, 1.0))
        return ChunkTime(
            forward_s=forward_s,
            dgrad_s=dgrad_s,
            wgrad_s=wgrad_s,
            joint_s=joint_s,
            joint_tail_s=draw(st.sampled_from([0.0, 0.01])),
        )

    return [one() for _ in range(num_chunks)]


def simulated_whole(
    shape: ScheduleShape, rule: TransferRule, chunks: list[ChunkTime], transfer_s: float
) -> Timeline:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(schedule, "shorter_shapes", lambda _: iter(()))
        return schedule.simulate_shape(shape, rule, chunks=chunks, transfer_s=transfer_s)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), asked=long_schedules())
def test_a_repeated_period_is_exact_for_any_chunk_times(
    data: st.DataObject, asked: tuple[ScheduleShape, TransferRule]
) -> None:
    shape, rule = asked
    chunks = random_chunks(data.draw, shape.num_chunks)
    transfer_s = data.draw(st.sampled_from([0.0, 0.003, 0.2]))
    short = schedule.simulate_shape(shape, rule, chunks=chunks, transfer_s=transfer_s)
    whole = simulated_whole(shape, rule, chunks, transfer_s)
    assert short.total_s == pytest.approx(whole.total_s, rel=1e-9)
    assert short.busy_s == pytest.approx(whole.busy_s, rel=1e-9)
    assert short.max_in_flight == whole.max_in_flight
    for ours, theirs in zip(short.chunks, whole.chunks, strict=True):
        assert ours.first_forward_s == pytest.approx(theirs.first_forward_s, rel=1e-9)
        assert ours.last_backward_s == pytest.approx(theirs.last_backward_s, rel=1e-9)
        assert ours.gradients_s == pytest.approx(theirs.gradients_s, rel=1e-9)
    for rank in range(shape.num_ranks):
        for ours, theirs in zip(short.slots(rank), whole.slots(rank), strict=True):
            assert ours.work == theirs.work
            assert ours.start_s == pytest.approx(theirs.start_s, rel=1e-9, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(asked=long_schedules())
def test_a_long_schedule_can_be_cut(asked: tuple[ScheduleShape, TransferRule]) -> None:
    shape, rule = asked
    longer = dataclasses.replace(shape, num_micro_batches=shape.num_micro_batches + 24 * shape.group_size)
    assert any(steady_cut(shorter, rule) is not None for shorter in shorter_shapes(longer))


def test_equal_chunks_repeat_after_the_shortest_simulation() -> None:
    one = ChunkTime(forward_s=1.0, dgrad_s=1.0, wgrad_s=1.0)
    timeline = simulate(
        ScheduleKind.INTERLEAVED,
        num_ranks=4,
        num_virtual=2,
        num_micro_batches=400,
        micro_batch_group_size=4,
        chunks=[one] * 8,
        transfer_s=0.0,
        overlaps_transfer=True,
    )
    assert timeline.repeat is not None
    assert timeline.repeat.period_s == pytest.approx(4 * 2 * 3.0)
    assert timeline.total_s == pytest.approx((400 * 2 + 3) * 3.0, rel=1e-12)
    expected = orders(timeline.shape)
    assert [tuple(slot.work for slot in timeline.slots(rank)) for rank in range(4)] == list(expected)


def test_a_steady_state_that_is_not_reached_is_simulated_whole() -> None:
    """The first rank is slower than the last by a hair, which eats up a head start only slowly."""
    chunks = [
        ChunkTime(forward_s=forward_s, dgrad_s=forward_s, wgrad_s=forward_s)
        for forward_s in (1.0001, 0.1, 0.1, 1.0)
    ]
    timeline = simulate(
        ScheduleKind.ONE_F_ONE_B,
        num_ranks=4,
        num_virtual=1,
        num_micro_batches=100,
        micro_batch_group_size=4,
        chunks=chunks,
        transfer_s=0.0,
        overlaps_transfer=False,
    )
    assert timeline.repeat is None
