"""Windows of data parallelism, counted by hand on small pipelines."""

import pytest

from moe_bench.projection.schedule.simulation import ScheduleKind
from moe_bench.projection.schedule.windows import Window, gather_windows, reduce_windows
from tests.projection.schedule.test_simulation import equal_chunks


def test_under_1f1b_the_flush_hides_the_reduction_of_later_ranks() -> None:
    # F = 1, B = 2: rank r ends 2 r before rank 0 and computes nothing more
    timeline = equal_chunks(ScheduleKind.ONE_F_ONE_B, 4, 1, 8)
    for aligned in (False, True):
        windows = reduce_windows(timeline, aligned=aligned)
        assert windows == tuple((Window(chunk=rank, busy_s=0.0, idle_s=2.0 * rank),) for rank in range(4))


def test_under_1f1b_a_rank_waits_r_forward_passes_for_its_first() -> None:
    windows = gather_windows(equal_chunks(ScheduleKind.ONE_F_ONE_B, 4, 1, 8))
    assert windows == tuple((Window(chunk=rank, busy_s=0.0, idle_s=1.0 * rank),) for rank in range(4))


def test_interleaving_hides_reductions_behind_the_earlier_chunks() -> None:
    # PP2 x VPP2, one group of 2: the last slots of rank 0 are B2.0 B2.1 B0.0 B0.1, of rank 1 B1.0 B1.1
    timeline = equal_chunks(ScheduleKind.INTERLEAVED, 2, 2, 2)
    names = [[slot.name for slot in timeline.slots(rank)] for rank in range(2)]
    assert names[0][-4:] == ["B2.0", "B2.1", "B0.0", "B0.1"]
    assert names[1][-2:] == ["B1.0", "B1.1"]
    now, aligned = reduce_windows(timeline, aligned=False), reduce_windows(timeline, aligned=True)
    # chunk 2 is complete after B2.1, with B0.0 and B0.1 to come; nothing comes after B0.1
    assert now[0] == (Window(chunk=0, busy_s=0.0, idle_s=0.0), Window(chunk=2, busy_s=4.0, idle_s=0.0))
    assert aligned[0] == now[0]
    # rank 1 ends one backward pass before rank 0; aligned, it starts to reduce chunk 3 after one more pass
    assert now[1] == (Window(chunk=1, busy_s=0.0, idle_s=2.0), Window(chunk=3, busy_s=4.0, idle_s=2.0))
    assert aligned[1] == (Window(chunk=1, busy_s=0.0, idle_s=2.0), Window(chunk=3, busy_s=2.0, idle_s=2.0))


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("kind", list(ScheduleKind))
def test_leaving_out_periods_moves_no_window(kind: ScheduleKind, aligned: bool) -> None:
    num_ranks = 1 if kind is ScheduleKind.NO_PIPELINE else 4
    num_virtual = 2 if kind.has_v_placement or kind.startswith("interleaved") else 1
    short, long = (
        equal_chunks(kind, num_ranks, num_virtual, num_micro_batches) for num_micro_batches in (16, 400)
    )
    assert short.repeat is None
    assert long.repeat is not None
    for one, other in zip(gather_windows(short), gather_windows(long), strict=True):
        assert one == other
    for one, other in zip(
        reduce_windows(short, aligned=aligned), reduce_windows(long, aligned=aligned), strict=True
    ):
        for window, longer in zip(one, other, strict=True):
            assert window.busy_s == pytest.approx(longer.busy_s)
            assert window.total_s == pytest.approx(longer.total_s)
