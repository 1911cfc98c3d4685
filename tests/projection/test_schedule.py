"""The simulated step against closed forms, and what must hold of any schedule."""

import pytest

from moe_bench.projection.schedule import ChunkTime, ScheduleError, ScheduleKind, Timeline, simulate


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
