"""What a user writes behind --what-if."""

from __future__ import annotations

import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.whatif import what_if


def test_constants_are_replaced_and_the_rest_is_left_to_the_loader() -> None:
    split = what_if(["constants.nic_fraction=0.6", "parallel.expert=32"], Constants())
    assert split.constants == Constants(nic_fraction=0.6)
    assert split.recipe_changes == ("parallel.expert=32",)


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
