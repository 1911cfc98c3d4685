"""How many ranks a token goes to: by hand, by limits, and by counting choices."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_bench.analysis.collectives import Collective, Phase
from moe_bench.analysis.comms import step_transfers
from moe_bench.analysis.dispatch import expected_groups
from moe_bench.spec.model import ModelSpec
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import DispatchSpec, Recipe, Routing
from tests.analysis.conftest import RecipeMaker

RANDOM = Routing(mode="random_logits")


def recipe_with(
    models: dict[str, ModelSpec],
    make_recipe: RecipeMaker,
    *,
    experts: int,
    top_k: int,
    num_groups: int | None = None,
    groups_per_token: int | None = None,
    routing: Routing = RANDOM,
) -> Recipe:
    model = models["deepseek_v3"]
    assert model.moe is not None
    router = model.moe.router.model_copy(
        update={"num_groups": num_groups, "groups_per_token": groups_per_token}
    )
    moe = model.moe.model_copy(update={"num_experts": experts, "top_k": top_k, "router": router})
    return make_recipe(
        model.model_copy(update={"moe": moe}), ParallelSpec(num_gpus=8, expert=8), routing=routing
    )


def ranks_of(recipe: Recipe, num_groups: int) -> float:
    assert recipe.model.moe is not None
    return expected_groups(recipe, recipe.model.moe, num_groups=num_groups)


def counted(experts: int, top_k: int, num_ranks: int, open_sets: list[set[int]]) -> float:
    """Distinct ranks on average over every choice of experts from every set of open experts."""
    hits = [
        len({expert * num_ranks // experts for expert in chosen})
        for allowed in open_sets
        for chosen in itertools.combinations(sorted(allowed), top_k)
    ]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_free_choice_matches_a_count_of_all_choices(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker, num_ranks: int
) -> None:
    recipe = recipe_with(models, make_recipe, experts=8, top_k=3)
    assert ranks_of(recipe, num_ranks) == pytest.approx(counted(8, 3, num_ranks, [set(range(8))]))


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8, 16])
def test_group_limited_choice_matches_a_count_of_all_choices(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker, num_ranks: int
) -> None:
    # 16 experts in 8 routing groups of 2, of which a token may use 3
    recipe = recipe_with(models, make_recipe, experts=16, top_k=4, num_groups=8, groups_per_token=3)
    open_sets = [
        {2 * group + expert for group in groups for expert in (0, 1)}
        for groups in itertools.combinations(range(8), 3)
    ]
    assert ranks_of(recipe, num_ranks) == pytest.approx(counted(16, 4, num_ranks, open_sets))


def test_deepseek_v3_reaches_at_most_four_nodes_of_eight(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    limited = recipe_with(models, make_recipe, experts=256, top_k=8, num_groups=8, groups_per_token=4)
    free = recipe_with(models, make_recipe, experts=256, top_k=8)
    # arXiv:2412.19437, 3.2.2: "each token to be dispatched to at most 4 nodes"; 5.3 of 8 without the limit
    assert 3.5 < ranks_of(limited, 8) < 4
    assert ranks_of(free, 8) == pytest.approx(8 * (1 - 0.338), abs=0.01)


def test_round_robin_keeps_a_token_on_two_ranks(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker
) -> None:
    neighbours = recipe_with(models, make_recipe, experts=256, top_k=8, routing=Routing(mode="round_robin"))
    # 8 neighbours, 4 experts to a rank
    assert ranks_of(neighbours, 64) == 2
    assert ranks_of(neighbours, 8) == 1
    # 6 neighbours of 64, 8 to a rank: of the first experts 0, 2, 4, 6 the last two cross
    odd = recipe_with(models, make_recipe, experts=64, top_k=6, routing=Routing(mode="round_robin"))
    assert ranks_of(odd, 8) == 1.5


@given(
    experts=st.sampled_from([8, 64, 256]), top_k=st.integers(1, 8), num_ranks=st.sampled_from([1, 2, 4, 8])
)
def test_a_token_reaches_at_least_one_rank_and_at_most_one_per_expert(
    models: dict[str, ModelSpec], make_recipe: RecipeMaker, experts: int, top_k: int, num_ranks: int
) -> None:
    reached = ranks_of(recipe_with(models, make_recipe, experts=experts, top_k=top_k), num_ranks)
    assert 1 - 1e-9 <= reached <= min(top_k, num_ranks) + 1e-9


def test_deepep_sends_less_than_an_all_to_all(models: dict[str, ModelSpec], make_recipe: RecipeMaker) -> None:
    parallel = ParallelSpec(num_gpus=64, expert=64)
    routed = {
        name: make_recipe(
            models["qwen3_235b_a22b"],
            parallel,
            routing=RANDOM,
            dispatch=DispatchSpec.model_validate({"dispatcher": name}),
        )
        for name in ("alltoall", "deepep", "hybridep")
    }
    carried = {
        name: sum(
            transfer.num_bytes
            for transfer in step_transfers(recipe, 0)
            if transfer.phase is Phase.FORWARD and transfer.op in (Collective.ALL_TO_ALL, Collective.RDMA)
        )
        for name, recipe in routed.items()
    }
    # 8 experts of 128 over 8 nodes lie on 5.3 nodes, one of which is the sender's own one time in eight
    assert carried["deepep"] == carried["hybridep"]
    assert 0.5 < carried["deepep"] / carried["alltoall"] < 0.65
