"""The what-if orders against torch.distributed.pipelining and the bubbles that their papers state."""

import itertools
from pathlib import Path

import pytest
from torch.distributed.pipelining.schedules import ScheduleDualPipeV, ScheduleZBVZeroBubble, _Action

from moe_bench.projection.schedule.program import Work
from moe_bench.projection.schedule.shape import Pass, PassKind
from moe_bench.projection.schedule.simulation import ScheduleError, ScheduleKind, ScheduleShape
from moe_bench.projection.schedule.whatif import what_if_order
from tests.projection.schedule.test_simulation import equal_chunks

TORCH_NAMES = {"F": PassKind.FORWARD, "B": PassKind.BACKWARD, "I": PassKind.DGRAD, "W": PassKind.WGRAD}


def shape_of(kind: ScheduleKind, num_ranks: int, num_micro_batches: int) -> ScheduleShape:
    return ScheduleShape(
        kind=kind,
        num_ranks=num_ranks,
        num_virtual=1 if kind is ScheduleKind.ZERO_BUBBLE_H1 else 2,
        num_micro_batches=num_micro_batches,
        group_size=num_ranks,
    )


def work_of(action: _Action) -> Work:
    parts = action.sub_actions or (action,)
    return tuple(
        Pass(TORCH_NAMES[one.computation_type.value], one.stage_index, one.microbatch_index) for one in parts
    )


@pytest.mark.parametrize(
    ("kind", "schedule"),
    [(ScheduleKind.ZERO_BUBBLE_V, ScheduleZBVZeroBubble), (ScheduleKind.DUAL_PIPE_V, ScheduleDualPipeV)],
)
@pytest.mark.parametrize(
    ("num_ranks", "num_micro_batches"), [(2, 4), (3, 6), (4, 8), (4, 19), (8, 16), (8, 40)]
)
def test_the_order_is_that_of_torch(
    kind: ScheduleKind, schedule: type, num_ranks: int, num_micro_batches: int
) -> None:
    theirs = schedule.__new__(schedule)  # its constructor wants stages on devices
    theirs.pp_group_size, theirs._n_microbatches, theirs.num_stages = (
        num_ranks,
        num_micro_batches,
        2 * num_ranks,
    )
    for rank in range(num_ranks):
        actions = theirs._calculate_single_rank_operations(rank)
        expected = [work_of(action) for action in actions if action is not None]
        assert list(what_if_order(shape_of(kind, num_ranks, num_micro_batches), rank)) == expected


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("num_micro_batches", [1, 3, 8, 33])
@pytest.mark.parametrize("times_s", [(1.0, 1.0, 1.0), (1.0, 1.2, 0.8), (1.0, 1.5, 0.5)])
def test_h1_leaves_a_bubble_of_f_and_b_less_two_w_per_rank(
    num_ranks: int, num_micro_batches: int, times_s: tuple[float, float, float]
) -> None:
    """arXiv:2401.10241, table 2: (p - 1)(T_F + T_B - T_W), T_B being the input gradient alone."""
    timeline = equal_chunks(ScheduleKind.ZERO_BUBBLE_H1, num_ranks, 1, num_micro_batches, times_s=times_s)
    forward_s, dgrad_s, wgrad_s = times_s
    if num_micro_batches >= num_ranks:
        assert timeline.bubble_s == pytest.approx(
            [(num_ranks - 1) * (forward_s + dgrad_s - wgrad_s)] * num_ranks
        )
    assert max(timeline.max_in_flight) <= num_ranks


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_v_leaves_no_idle_time_between_the_first_and_the_last_slot_of_a_rank(num_ranks: int) -> None:
    """arXiv:2405.15362: with F = D = W, ranks are idle only before they start and after they have ended."""
    timeline = equal_chunks(ScheduleKind.ZERO_BUBBLE_V, num_ranks, 2, 4 * num_ranks, times_s=(1.0, 1.0, 1.0))
    for rank in range(num_ranks):
        for one, following in itertools.pairwise(timeline.slots(rank)):
            assert one.end_s == following.start_s
        assert timeline.max_in_flight[rank] <= 2 * num_ranks  # what 1F1B holds on its first rank


@pytest.mark.parametrize("num_ranks", [2, 4, 8])
def test_dual_pipe_v_leaves_the_bubble_of_its_authors(num_ranks: int) -> None:
    """github.com/deepseek-ai/DualPipe: (PP / 2 - 1)(F&B + B - 3 W) with PP = 2 p stages on p ranks."""
    timeline = equal_chunks(ScheduleKind.DUAL_PIPE_V, num_ranks, 2, 6 * num_ranks, times_s=(1.0, 1.0, 1.0))
    merged_s, backward_s, wgrad_s = 3.0, 2.0, 1.0
    bubble_s = (num_ranks - 1) * (merged_s + backward_s - 3 * wgrad_s)
    assert min(timeline.bubble_s) == pytest.approx(bubble_s)


def test_too_few_micro_batches_are_refused() -> None:
    with pytest.raises(ScheduleError, match="at least 8 micro batches"):
        shape_of(ScheduleKind.DUAL_PIPE_V, 4, 7)
    with pytest.raises(ScheduleError, match="at least 7 micro batches"):
        shape_of(ScheduleKind.ZERO_BUBBLE_V, 4, 6)


def documented_bubbles() -> list[tuple[ScheduleKind, int, str, float]]:
    """Rows of the first table of docs/projection.md, section "Pipeline schedules"."""
    page = (Path(__file__).resolve().parents[3] / "docs" / "projection.md").read_text()
    section = page.split("## Pipeline schedules")[1].split("###")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in section.splitlines()
        if line[:1] == "|"
    ]
    kinds = {kind.label: kind for kind in ScheduleKind}
    return [(kinds[label], int(chunks), idle, float(most)) for label, chunks, idle, most in rows[2:]]


@pytest.mark.parametrize(("kind", "num_virtual", "idle", "most_in_flight"), documented_bubbles())
def test_the_documented_bubbles_are_the_simulated_ones(
    kind: ScheduleKind, num_virtual: int, idle: str, most_in_flight: float
) -> None:
    timeline = equal_chunks(kind, 8, num_virtual, 32, times_s=(1.0, 1.0, 1.0))
    assert f"{timeline.bubble_fraction:.1%}" == idle
    assert max(timeline.max_in_flight) / num_virtual == most_in_flight
