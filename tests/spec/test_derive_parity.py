"""What is not compared on its loss, and how far a rounding goes."""

from __future__ import annotations

import pytest

from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.derive_parity import ROUNDOFF_FRACTIONS, nudge_fraction, require_causal
from moe_bench.spec.load import Loader
from moe_bench.spec.model import RouterChoice
from moe_bench.spec.recipe import Recipe


def recipe() -> Recipe:
    loader = Loader(root=recipes_root(), rules=())
    return loader.recipe(find_recipe("olmoe_1b_7b", loader))


def with_choice(choice: RouterChoice) -> Recipe:
    before = recipe()
    assert before.model.moe is not None
    router = before.model.moe.router.model_copy(update={"choice": choice})
    moe = before.model.moe.model_copy(update={"router": router})
    return before.model_copy(update={"model": before.model.model_copy(update={"moe": moe})})


@pytest.mark.parametrize("choice", ["expert_choice", "sinkhorn"])
def test_a_router_that_sees_later_tokens_is_refused(choice: RouterChoice) -> None:
    with pytest.raises(BadInputError, match=f"a {choice} router sees later tokens"):
        require_causal(with_choice(choice))


def test_top_k_is_compared() -> None:
    require_causal(recipe())


def test_the_coarser_precision_says_how_far_a_rounding_goes() -> None:
    fine = recipe().model_copy(update={"precision": "fp32"})
    coarse = recipe().model_copy(update={"precision": "mxfp8"})
    assert nudge_fraction(fine, fine) == 2**-24
    assert nudge_fraction(fine, coarse) == nudge_fraction(coarse, fine) == ROUNDOFF_FRACTIONS["mxfp8"]
