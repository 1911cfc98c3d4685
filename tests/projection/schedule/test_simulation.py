"""The simulated step against closed forms, and what must hold of any schedule."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bench.projection.schedule.program import links_of
from moe_bench.projection.schedule.shape import Pass, PassKind
from moe_bench.projection.schedule.simulation import (
    ChunkTime,
    ScheduleError,
    ScheduleKind,
    ScheduleShape,
    Timeline,
    TransferRule,
    simulate_shape,
)
from tests.projection.schedule.simulate import simulate


def equal_chunks(
    kind: ScheduleKind,
    num_ranks: int,
    num_virtual: int,
    num_micro_batches: int,
    *,
    times_s: tuple[float, float, float] = (1.0, 1.25, 0.75),
    transfer_s: float = 0.0,
    overlaps: bool | None = None,
) -> Timeline:
    forward_s, dgrad_s, wgrad_s = times_s
    one = ChunkTime(forward_s=forward_s, dgrad_s=dgrad_s, wgrad_s=wgrad_s, joint_s=sum(times_s))
    return simulate(
        kind,
        num_ranks=num_ranks,
        num_virtual=num_virtual,
        num_micro_batches=num_micro_batches,
        micro_batch_group_size=num_ranks,
        chunks=[one] * (num_ranks * num_virtual),
        transfer_s=transfer_s,
        overlaps_transfer=kind.overlap_choices[-1] if overlaps is None else overlaps,
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 16])
@pytest.mark.parametrize("num_micro_batches", [1, 3, 16, 200])
def test_1f1b_takes_m_plus_pp_less_1_passes(num_ranks: int, num_micro_batches: int) -> None:
    timeline = equal_chunks(ScheduleKind.ONE_F_ONE_B, num_ranks, 1, num_micro_batches)
    assert timeline.total_s == pytest.approx((num_micro_batches + num_ranks - 1) * (1.0 + 2.0), rel=1e-12)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("kind", [ScheduleKind.INTERLEAVED, ScheduleKind.INTERLEAVED_EP_OVERLAP])
@pytest.mark.parametrize(("num_ranks", "num_virtual"), [(2, 2), (4, 3), (8, 4)])
def test_interleaving_divides_the_bubble_by_the_chunks(
    kind: ScheduleKind, num_ranks: int, num_virtual: int, overlaps: bool
) -> None:
    timeline = equal_chunks(kind, num_ranks, num_virtual, 4 * num_ranks, overlaps=overlaps)
    if kind is ScheduleKind.INTERLEAVED:
        assert timeline.bubble_s == pytest.approx([(num_ranks - 1) * (1.0 + 2.0)] * num_ranks)
    else:  # merged passes still take F + B here, but each must wait for the slower of two inputs
        assert min(timeline.bubble_s) >= (num_ranks - 1) * (1.0 + 2.0) * (1 - 1e-12)


def test_a_schedule_that_cannot_exist_says_what_to_change() -> None:
    with pytest.raises(ScheduleError, match="the last group is smaller than the pipeline"):
        equal_chunks(ScheduleKind.INTERLEAVED, 4, 2, 9)


def test_transfers_of_1f1b_stand_in_the_open() -> None:
    # PP2, two micro batches, F = 1, B = 2, t = 0.1; both ranks wait for every transfer
    timeline = equal_chunks(ScheduleKind.ONE_F_ONE_B, 2, 1, 2, transfer_s=0.1)
    first, last = list(timeline.slots(0)), list(timeline.slots(1))
    assert [slot.name for slot in first] == ["F0.0", "F0.1", "B0.0", "B0.1"]
    assert [slot.name for slot in last] == ["F1.0", "B1.0", "F1.1", "B1.1"]
    # F0.0 0-1, sent at 1.1; F0.1 1.1-2.1, which waits for rank 1; B1.0 ends at 4.1: both cross until 4.2
    assert [slot.start_s for slot in first] == pytest.approx([0.0, 1.1, 4.2, 7.3])
    assert [slot.start_s for slot in last] == pytest.approx([1.1, 2.1, 4.2, 5.2])
    assert timeline.total_s == pytest.approx(9.3)


@st.composite
def schedules(draw: st.DrawFn) -> tuple[ScheduleShape, TransferRule, list[ChunkTime], float]:
    kind = draw(st.sampled_from([one for one in ScheduleKind if one is not ScheduleKind.NO_PIPELINE]))
    interleaves = kind in (ScheduleKind.INTERLEAVED, ScheduleKind.INTERLEAVED_EP_OVERLAP)
    num_ranks = draw(st.integers(2, 5))
    group_size = num_ranks + draw(st.integers(0, 2))
    num_micro_batches = draw(st.integers(2 * num_ranks, 5 * num_ranks))
    if interleaves:
        num_micro_batches = group_size * draw(st.integers(1, 3)) + draw(st.sampled_from([0, num_ranks]))
        if 0 < num_micro_batches % group_size < num_ranks:
            num_micro_batches += num_ranks
    shape = ScheduleShape(
        kind=kind,
        num_ranks=num_ranks,
        num_virtual=draw(st.integers(2, 3)) if interleaves else 2 if kind.has_v_placement else 1,
        num_micro_batches=num_micro_batches - num_micro_batches % group_size
        if interleaves
        else num_micro_batches,
        group_size=group_size,
    )
    rule = TransferRule(
        overlaps=draw(st.sampled_from(kind.overlap_choices)), waits_for_sends=draw(st.booleans())
    )
    chunks = [draw(chunk_times()) for _ in range(shape.num_chunks)]
    return shape, rule, chunks, draw(st.sampled_from([0.0, 0.01, 0.5]))


@st.composite
def chunk_times(draw: st.DrawFn) -> ChunkTime:
    forward_s, dgrad_s, wgrad_s = (draw(st.floats(0.05, 2.0)) for _ in range(3))
    joint_s = (forward_s + dgrad_s + wgrad_s) * draw(st.floats(0.6, 1.0))
    return ChunkTime(forward_s=forward_s, dgrad_s=dgrad_s, wgrad_s=wgrad_s, joint_s=joint_s)


@settings(deadline=None)
@given(asked=schedules())
def test_ranks_do_one_thing_at_a_time_and_everything_in_its_order(
    asked: tuple[ScheduleShape, TransferRule, list[ChunkTime], float],
) -> None:
    shape, rule, chunks, transfer_s = asked
    timeline = simulate_shape(shape, rule, chunks=chunks, transfer_s=transfer_s)
    starts_s: dict[Pass, float] = {}
    ends_s: dict[Pass, float] = {}
    for rank in range(shape.num_ranks):
        slots = list(timeline.slots(rank))
        assert all(one.end_s <= following.start_s for one, following in itertools.pairwise(slots))
        for slot in slots:
            assert all(shape.rank_of(one.chunk) == rank for one in slot.work)
            starts_s |= dict.fromkeys(slot.work, slot.start_s)
            ends_s |= dict.fromkeys(slot.work, slot.end_s)
    for one, start_s in starts_s.items():
        for needed, lag_s in causes(shape, one, ends_s, transfer_s):
            assert start_s >= ends_s[needed] + lag_s - 1e-9
    num_forward = sum(one.kind is PassKind.FORWARD for one in ends_s)
    num_backward = sum(one.kind in (PassKind.BACKWARD, PassKind.WGRAD) for one in ends_s)
    assert num_forward == num_backward == shape.num_chunks * shape.num_micro_batches
    assert timeline.total_s >= max(timeline.busy_s) * (1 - 1e-12)
    assert timeline.total_s == pytest.approx(max(ends_s.values()))
    assert -1e-12 <= timeline.bubble_fraction < 1


def causes(
    shape: ScheduleShape, one: Pass, ends_s: dict[Pass, float], transfer_s: float
) -> list[tuple[Pass, float]]:
    """What must have ended before `one`, with the time of the transfer from another rank."""
    kind, chunk, batch = one
    gradient = PassKind.BACKWARD if Pass(PassKind.BACKWARD, chunk, batch) in ends_s else PassKind.DGRAD
    if kind is PassKind.WGRAD:
        return [(Pass(PassKind.DGRAD, chunk, batch), 0.0)]
    lag_s = transfer_s if links_of(shape).tensor_read(one) is not None else 0.0
    if kind is PassKind.FORWARD:
        return [(Pass(PassKind.FORWARD, chunk - 1, batch), lag_s)] if chunk else []
    own = (Pass(PassKind.FORWARD, chunk, batch), 0.0)
    if chunk == shape.num_chunks - 1:
        return [own]
    gradient = PassKind.BACKWARD if Pass(PassKind.BACKWARD, chunk + 1, batch) in ends_s else PassKind.DGRAD
    return [own, (Pass(gradient, chunk + 1, batch), lag_s)]


@settings(deadline=None)
@given(asked=schedules(), data=st.data())
def test_a_slower_pass_or_link_never_makes_the_step_faster(
    asked: tuple[ScheduleShape, TransferRule, list[ChunkTime], float], data: st.DataObject
) -> None:
    """With a fixed order there are no Graham anomalies: every instant is a maximum of sums."""
    shape, rule, chunks, transfer_s = asked
    before = simulate_shape(shape, rule, chunks=chunks, transfer_s=transfer_s)
    place = data.draw(st.integers(0, len(chunks) - 1))
    slower = dataclasses.replace(chunks[place], wgrad_s=chunks[place].wgrad_s + 0.5, joint_s=None)
    joint_s = chunks[place].joint_s
    assert joint_s is not None
    ratio = joint_s / (chunks[place].forward_s + chunks[place].backward_s)
    slower = dataclasses.replace(slower, joint_s=ratio * (slower.forward_s + slower.backward_s))
    changed = [*chunks[:place], slower, *chunks[place + 1 :]]
    after = simulate_shape(shape, rule, chunks=changed, transfer_s=transfer_s)
    assert after.total_s >= before.total_s - 1e-9
    later = simulate_shape(shape, rule, chunks=chunks, transfer_s=transfer_s + 0.1)
    assert later.total_s >= before.total_s - 1e-9


@pytest.mark.parametrize("kind", [ScheduleKind.INTERLEAVED, ScheduleKind.INTERLEAVED_EP_OVERLAP])
@pytest.mark.parametrize(
    ("num_ranks", "num_virtual", "num_micro_batches"),
    [(2, 2, 2), (4, 2, 8), (4, 5, 12), (8, 4, 64), (8, 2, 400)],
)
def test_chunks_in_flight_are_the_warm_up_and_one_more(
    kind: ScheduleKind, num_ranks: int, num_virtual: int, num_micro_batches: int
) -> None:
    timeline = equal_chunks(kind, num_ranks, num_virtual, num_micro_batches)
    # the warm-up of schedules.py, get_pp_rank_microbatches; then one more comes before one goes, unless a
    # forward and a backward pass run layer by layer beside one another, which the warm-up is one longer for
    expected = [
        min(num_micro_batches * num_virtual, 2 * (num_ranks - rank - 1) + (num_virtual - 1) * num_ranks + 1)
        for rank in range(num_ranks)
    ]
    assert list(timeline.max_in_flight) == expected


def test_merged_passes_take_the_joint_time() -> None:
    """On one rank: F, then m - 1 merged slots, then B (combined_1f1b_schedule_for_no_pipelining)."""
    one = ChunkTime(forward_s=1.0, dgrad_s=1.0, wgrad_s=1.0, joint_s=2.5)
    timeline = simulate(
        ScheduleKind.INTERLEAVED_EP_OVERLAP,
        num_ranks=1,
        num_virtual=1,
        num_micro_batches=4,
        micro_batch_group_size=1,
        chunks=[one],
        transfer_s=0.0,
        overlaps_transfer=False,
    )
    assert [slot.name for slot in timeline.slots(0)] == [
        "F0.0",
        "F0.1+B0.0",
        "F0.2+B0.1",
        "F0.3+B0.2",
        "B0.3",
    ]
    assert timeline.total_s == pytest.approx(1.0 + 3 * 2.5 + 2.0)


def test_merged_passes_without_a_joint_time_are_refused() -> None:
    with pytest.raises(ScheduleError, match="state joint_s of chunk"):
        simulate(
            ScheduleKind.INTERLEAVED_EP_OVERLAP,
            num_ranks=2,
            num_virtual=2,
            num_micro_batches=4,
            micro_batch_group_size=2,
            chunks=[ChunkTime(forward_s=1.0, dgrad_s=1.0, wgrad_s=1.0)] * 4,
            transfer_s=0.0,
            overlaps_transfer=True,
        )


def test_1f1b_does_not_overlap_its_transfers() -> None:
    with pytest.raises(ScheduleError, match="overlaps_transfer = True"):
        equal_chunks(ScheduleKind.ONE_F_ONE_B, 4, 1, 8, overlaps=True)


def test_hidden_transfers_cost_only_warm_up_and_flush() -> None:
    """PP4 x VPP2, 5 groups: what is in the open does not grow with the steady state."""
    exposed_s = []
    for num_groups in (5, 10):
        free, paid = (
            equal_chunks(ScheduleKind.INTERLEAVED, 4, 2, 4 * num_groups, transfer_s=transfer_s, overlaps=True)
            for transfer_s in (0.0, 0.1)
        )
        exposed_s.append(paid.total_s - free.total_s)
    assert exposed_s[0] == pytest.approx(exposed_s[1])
    assert exposed_s[0] > 0


def test_what_a_merged_slot_computes_last_hides_its_transfers() -> None:
    """PP4 x VPP2; with half a second behind the sends, transfers of 0.1 s leave the steady state alone."""
    grown_s = {}
    for tail_s in (0.0, 0.5):
        one = ChunkTime(forward_s=1.0, dgrad_s=1.0, wgrad_s=1.0, joint_s=2.5, joint_tail_s=tail_s)
        totals_s = [
            simulate(
                ScheduleKind.INTERLEAVED_EP_OVERLAP,
                num_ranks=4,
                num_virtual=2,
                num_micro_batches=num_micro_batches,
                micro_batch_group_size=4,
                chunks=[one] * 8,
                transfer_s=0.1,
                overlaps_transfer=True,
            ).total_s
            for num_micro_batches in (20, 40)
        ]
        grown_s[tail_s] = totals_s[1] - totals_s[0]
    assert grown_s[0.5] == pytest.approx(20 * 2 * 2.5)
    assert grown_s[0.0] == pytest.approx(20 * 2 * (2.5 + 0.1))
