"""What fits, what does not, and what the closed form cannot tell apart."""

from __future__ import annotations

import pytest

from moe_bench.analysis.memory import memory_fit
from moe_bench.analysis.memory_verdict import MemoryVerdict, bounds_verdict, rank_verdict, verdict
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader

LOADER = Loader(root=recipes_root(), rules=())


@pytest.mark.parametrize(
    ("held", "needed", "said"),
    [
        (70, 79, MemoryVerdict.FITS),
        (79, 80, MemoryVerdict.TOO_CLOSE),
        (70, 80, MemoryVerdict.TOO_CLOSE),
        (80, 85, MemoryVerdict.DOES_NOT_FIT),
    ],
)
def test_the_point_decides_what_cannot_fit_and_the_upper_bound_what_can(
    held: int, needed: int, said: MemoryVerdict
) -> None:
    assert bounds_verdict(held, needed, 79) is said


def test_a_recipe_is_judged_by_its_fullest_rank() -> None:
    fit = memory_fit(LOADER.recipe(find_recipe("deepseek_v3", LOADER)))
    assert verdict(fit) is rank_verdict(fit.worst, fit.usable_bytes) is MemoryVerdict.FITS
    assert fit.fits
