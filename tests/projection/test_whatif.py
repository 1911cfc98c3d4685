"""What a user writes behind --what-if."""

from __future__ import annotations

import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.schedule.shape import ScheduleKind
from moe_bench.projection.whatif import what_if


def test_constants_are_replaced_and_the_rest_is_left_to_the_loader() -> None:
    split = what_if(["constants.nic_fraction=0.6", "parallel.expert=32"], Constants())
    assert split.constants == Constants(nic_fraction=0.6)
    assert split.recipe_changes == ("parallel.expert=32",)


def test_a_schedule_is_kept_apart_and_the_last_one_counts() -> None:
    split = what_if(["schedule=zero_bubble_v", "schedule=dual_pipe_v"], Constants())
    assert split.schedule is ScheduleKind.DUAL_PIPE_V
    assert split.recipe_changes == ()
    assert what_if(["parallel.expert=32"], Constants()).schedule is None


def test_a_schedule_that_does_not_exist_is_refused_with_those_that_do() -> None:
    with pytest.raises(BadInputError, match="no such schedule; write one of one_f_one_b"):
        what_if(["schedule=dualpipe"], Constants())


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ("constants.nic_fractio=0.6", "did you mean constants.nic_fraction?"),
        ("constants.nic_fraction=fast", "'fast' is no number above 0"),
        ("constants.nic_fraction=-1", "'-1' is no number above 0"),
        ("constants.nic_fraction=nan", "'nan' is no number above 0"),
        ("constants.nic_fraction", "'' is no number above 0"),
    ],
)
def test_a_constant_that_cannot_be_is_refused(change: str, problem: str) -> None:
    with pytest.raises(BadInputError, match=problem.replace("?", r"\?")):
        what_if([change], Constants())
