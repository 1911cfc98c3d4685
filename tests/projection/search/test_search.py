"""The pruned search finds what a full enumeration finds, and says why nothing can be found."""

import pytest

from moe_bench.analysis.memory import memory_fit
from moe_bench.errors import BadInputError
from moe_bench.projection.search.layout import recipe_of
from moe_bench.projection.search.pareto import CEILING_FRACTIONS
from moe_bench.projection.search.search import Found, SearchResult, peak_bytes, search
from moe_bench.projection.search.space import Space
from moe_bench.projection.step import project
from tests.projection.search_spaces import LOADER, legal_families, space_of

NUM_WANTED = 5
SPACES = {
    "one node of experts": space_of(
        "qwen3_30b_a3b",
        16,
        "parallel.tensor=1",
        "parallel.expert_tensor=1",
        "dispatch.dispatcher=deepep",
        "parallel.virtual_pipeline=1",
        "parallel.data_sharding=distributed_optimizer",
        global_batch_size=256,
    ),
    "divided by Megatron-FSDP or not, and context ranks of every kind": space_of(
        "qwen3_30b_a3b",
        16,
        "parallel.tensor=1",
        "parallel.expert_tensor=1",
        "dispatch.dispatcher=alltoall",
        "overlap.expert_parallel=false",
        "recompute.granularity=full",
        "recompute.modules=[]",
        "recompute.num_layers=1",
        "parallel.virtual_pipeline=1",
        seq_len=16384,
        global_batch_size=64,
        micro_batch_sizes=(1,),
    ),
    "interleaved, near the limit": space_of(
        "qwen3_235b_a22b",
        128,
        "parallel.tensor=2",
        "parallel.expert_tensor=1",
        "parallel.expert=16",
        "parallel.pipeline=8",
        "dispatch.dispatcher=alltoall",
        global_batch_size=256,
        micro_batch_sizes=(1,),
    ),
    "no experts": space_of(
        "llama3_8b",
        8,
        "parallel.virtual_pipeline=1",
        "parallel.data_sharding=distributed_optimizer",
        seq_len=16384,
        global_batch_size=16,
        micro_batch_sizes=(1,),
    ),
}


class Enumerated:
    """Every legal layout of a space, projected."""

    def __init__(self, space: Space) -> None:
        self.num_legal = 0
        self.fitting: list[tuple[float, int]] = []
        self.close: list[float] = []
        self.fastest: dict[object, float] = {}
        """Of each group of layouts that fit."""
        self.fastest_close: dict[object, float] = {}
        for family, splits in legal_families(space):
            for split in splits:
                self.num_legal += 1
                indices = (*family, split)
                recipe = space.recipe(indices)
                memory = memory_fit(recipe)
                if peak_bytes(memory) > memory.usable_bytes:
                    continue
                made = project(recipe)
                found = Found(indices=indices, layout=space.layout(indices), projection=made, memory=memory)
                if memory.fits:
                    self.fitting.append((made.step_s, peak_bytes(memory)))
                    self._note(self.fastest, found)
                else:
                    self.close.append(made.step_s)
                    self._note(self.fastest_close, found)
        self.usable_bytes = memory.usable_bytes

    def _note(self, fastest: dict[object, float], found: Found) -> None:
        step_s = found.projection.step_s
        fastest[found.group] = min(step_s, fastest.get(found.group, step_s))


@pytest.fixture(scope="module", params=SPACES)
def both(request: pytest.FixtureRequest) -> tuple[SearchResult, Enumerated]:
    space = SPACES[request.param]
    return search(space, num_wanted=NUM_WANTED), Enumerated(space)


def test_the_fastest_are_those_of_a_full_enumeration(both: tuple[SearchResult, Enumerated]) -> None:
    result, enumerated = both
    expected = sorted(enumerated.fastest.values())[:NUM_WANTED]
    assert [one.projection.step_s for one in result.ranked] == pytest.approx(expected, rel=1e-12)
    assert len({one.group for one in result.ranked}) == len(result.ranked)


def test_the_search_projects_less_than_all(both: tuple[SearchResult, Enumerated]) -> None:
    result, enumerated = both
    assert result.num_legal == enumerated.num_legal
    assert result.num_simulated < len(enumerated.fitting) + len(enumerated.close)


def test_every_legal_layout_is_counted_once(both: tuple[SearchResult, Enumerated]) -> None:
    result, _ = both
    examined = result.num_fitting + result.num_too_close + result.num_not_fitting
    assert result.num_over + result.num_slower + examined == result.num_legal
    assert result.num_legal + sum(result.refused.values()) == result.num_generated
    assert 0 < result.num_simulated <= result.num_fitting + result.num_too_close


def test_the_fastest_under_every_ceiling_is_that_of_a_full_enumeration(
    both: tuple[SearchResult, Enumerated],
) -> None:
    result, enumerated = both
    expected = {}
    for ceiling in CEILING_FRACTIONS:
        below = [step_s for step_s, held in enumerated.fitting if held <= ceiling * enumerated.usable_bytes]
        if below:
            expected[ceiling] = min(below)
    found = {ceiling: one.projection.step_s for ceiling, one in result.front}
    assert found == pytest.approx(expected, rel=1e-12)


def test_what_is_too_close_to_say_is_faster_than_the_first_that_fits(
    both: tuple[SearchResult, Enumerated],
) -> None:
    result, enumerated = both
    best_s = result.ranked[0].projection.step_s
    expected = sorted(step_s for step_s in enumerated.fastest_close.values() if step_s < best_s)
    assert [one.projection.step_s for one in result.close] == pytest.approx(expected[:NUM_WANTED], rel=1e-12)


def test_a_published_layout_is_found_again_where_nothing_is_projected_to_be_faster() -> None:
    published = LOADER.recipe(LOADER.root / "qwen3_30b_a3b/h100_sxm_16g_bf16.yaml")
    space = space_of(
        "qwen3_30b_a3b", 16, micro_batch_sizes=(1,), global_batch_size=published.global_batch_size
    )
    first = search(space, num_wanted=1).ranked[0]
    assert first.projection.step_s <= project(published).step_s
    assert first.recipe.parallel == published.parallel
    assert first.recipe.overlap == published.overlap


def test_dispatchers_that_are_projected_alike_are_one_result() -> None:
    space = space_of(
        "qwen3_30b_a3b",
        16,
        "parallel.tensor=1",
        "parallel.expert=16",
        "parallel.pipeline=1",
        global_batch_size=256,
    )
    result = search(space, num_wanted=3)
    assert result.ranked[0].layout.dispatcher == space.base.dispatch.dispatcher == "hybridep"
    assert result.ranked[0].like == ("deepep",)
    for one in result.ranked:
        for dispatcher in one.like:
            recipe = recipe_of(space.base, one.layout._replace(dispatcher=dispatcher))
            assert project(recipe).step_s == pytest.approx(one.projection.step_s, rel=1e-12)
    assert len({one.projection.step_s for one in result.ranked}) == 3


def test_without_a_legal_layout_the_rule_that_refuses_most_is_named() -> None:
    space = space_of("qwen3_30b_a3b", 16, "parallel.expert=7")
    with pytest.raises(
        BadInputError, match=r"most, .*, break the rule experts_per_rank, such as EP7, 128 experts: every"
    ):
        search(space, num_wanted=1)


def test_where_nothing_fits_the_smallest_need_and_its_stage_are_named() -> None:
    space = space_of("deepseek_v3", 8, "parallel.tensor=1", global_batch_size=64)
    with pytest.raises(BadInputError, match=r"needs \d+\.\d of 79\.1 GiB on pipeline rank \d of \d"):
        search(space, num_wanted=1)
