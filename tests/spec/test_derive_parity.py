"""What is not compared on its loss, how far a rounding goes, and what is plain beside a recipe."""

from __future__ import annotations

import pytest

from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import find_recipe, recipe_paths, recipes_root
from moe_bench.spec.derive_parity import (
    ROUNDOFF_FRACTIONS,
    changes_between,
    fp32_plan,
    nudge_fraction,
    plain_plan,
    require_causal,
    require_comparable,
    require_same_model,
    settings_of_toy,
    toy_of,
    watched_plan,
)
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader
from moe_bench.spec.model import RouterChoice
from moe_bench.spec.recipe import Recipe, TokenDrop
from moe_bench.spec.scale import Plan, full_plan, smoke_plan


def recipe() -> Recipe:
    loader = Loader(root=recipes_root(), rules=())
    return loader.recipe(find_recipe("olmoe_1b_7b", loader))


def with_choice(choice: RouterChoice) -> Recipe:
    before = recipe()
    assert before.model.moe is not None
    router = before.model.moe.router.model_copy(update={"choice": choice})
    moe = before.model.moe.model_copy(update={"router": router})
    return before.model_copy(update={"model": before.model.model_copy(update={"moe": moe})})


@pytest.mark.parametrize("choice", ["expert_choice", "gshard", "sinkhorn"])
def test_a_router_that_sees_later_tokens_is_refused(choice: RouterChoice) -> None:
    with pytest.raises(BadInputError, match=f"the {choice} router sees later tokens"):
        require_causal(with_choice(choice))


def test_top_k_is_compared() -> None:
    require_causal(recipe())


def test_a_capacity_is_compared_where_the_first_tokens_stay_and_no_other() -> None:
    by_score, by_position = (
        recipe().model_copy(update={"token_drop": TokenDrop(capacity_factor=1.0, policy=policy)})
        for policy in ("probs", "position")
    )
    require_causal(by_position)
    with pytest.raises(BadInputError, match=r"token_drop\.policy: .*sees later tokens.*with position"):
        require_causal(by_score)


def test_weights_that_are_built_in_fp8_are_no_comparison_on_gpus_and_the_toy_has_none() -> None:
    name = "qwen3_30b_a3b/h100_sxm_16g_fp8_tensorwise"
    asked = LOADER.recipe(find_recipe(name, LOADER))
    with pytest.raises(BadInputError, match=r"--set low_precision\.param_gather=false") as caught:
        require_comparable(full_plan(asked, modified=()))
    (change,) = [word for word in str(caught.value).split() if word.startswith("low_precision.")][-1:]
    mended = LOADER.recipe(find_recipe(name, LOADER), changes=[change])
    require_comparable(full_plan(mended, modified=(change,)))
    require_comparable(smoke_plan(asked, host=LOADER.system("cpu_host"), modified=()))


def test_a_slice_is_one_rank_whose_loss_says_nothing() -> None:
    plan = full_plan(recipe(), modified=()).model_copy(update={"scale": "slice"})
    with pytest.raises(BadInputError, match="a slice is one rank of the model"):
        require_comparable(plan)


def test_the_coarser_precision_says_how_far_a_rounding_goes() -> None:
    fine = recipe().model_copy(update={"precision": "fp32"})
    coarse = recipe().model_copy(update={"precision": "mxfp8"})
    assert nudge_fraction(fine, fine) == 2**-24
    assert nudge_fraction(fine, coarse) == nudge_fraction(coarse, fine) == ROUNDOFF_FRACTIONS["mxfp8"]


LOADER = Loader(root=recipes_root(), rules=())


def toy(name: str) -> Plan:
    asked = LOADER.recipe(find_recipe(name, LOADER))
    return smoke_plan(asked, host=LOADER.system("cpu_host"), modified=())


@pytest.mark.parametrize("name", [f"{path.parent.name}/{path.stem}" for path in recipe_paths(LOADER.root)])
def test_every_recipe_has_a_plain_setting_of_the_same_model_that_can_run(name: str) -> None:
    own = toy(name)
    for variant in (own, fp32_plan(own)):
        plain = plain_plan(variant)
        assert legality_problems(plain.recipe) == legality_problems(variant.recipe) == ()
        assert plain.num_ranks == (2 if plain.recipe.token_drop and plain.recipe.parallel.tensor > 1 else 1)
        assert plain.recipe.model == variant.recipe.model
        assert plain.recipe.precision == variant.recipe.precision
        # what is plain has nothing plainer
        assert plain_plan(plain).recipe == plain.recipe


def test_a_capacity_keeps_what_divides_a_sequence() -> None:
    plain = plain_plan(toy("mixtral_8x22b/h100_sxm_128g_bf16_capacity")).recipe
    assert (plain.parallel.tensor, plain.parallel.sequence_parallel, plain.parallel.num_gpus) == (2, True, 2)
    assert plain.dispatch.dispatcher == "alltoall"


def test_gradient_norms_are_computed_also_where_nothing_is_clipped() -> None:
    own = toy("kimi_k2")
    watched = watched_plan(own)
    assert (own.recipe.optimizer.clip_grad_norm, watched.recipe.optimizer.clip_grad_norm) == (0, 1e9)
    assert settings_of_toy(watched.recipe) == settings_of_toy(own.recipe)
    assert "optimizer.clip_grad_norm" in {row.field for row in watched.substitutions}
    clipped = toy("mixtral_8x7b")
    assert watched_plan(clipped) == clipped


def test_the_toy_of_a_plan_is_the_same_at_every_scale() -> None:
    own = toy("deepseek_v3")
    asked = LOADER.recipe(find_recipe("deepseek_v3", LOADER))
    assert settings_of_toy(toy_of(full_plan(asked, modified=()))) == settings_of_toy(toy_of(own))


def test_changes_are_named_as_they_would_be_typed() -> None:
    own = toy("olmoe_1b_7b")
    assert changes_between(plain_plan(own).recipe, own.recipe)[0] == "parallel.num_gpus=2"
    assert changes_between(own.recipe, own.recipe) == ()


def test_two_recipes_of_other_models_or_depths_are_not_compared() -> None:
    require_same_model(toy("qwen3_30b_a3b/h100_sxm_8g_bf16"), toy("qwen3_30b_a3b/h100_sxm_8g_bf16_quack"))
    with pytest.raises(BadInputError, match="another model than qwen3_30b_a3b/h100_sxm_8g_bf16"):
        require_same_model(toy("qwen3_30b_a3b/h100_sxm_8g_bf16"), toy("olmoe_1b_7b"))
