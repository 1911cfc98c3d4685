"""The trees that rules are learned into say what the rules say, on every layout of whole spaces."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bench.projection.search.legality import Legality
from moe_bench.projection.search.space import Space
from moe_bench.spec.legality import legality_problems
from tests.projection.search_spaces import space_of

ONE_TENSOR = ("parallel.tensor=1", "parallel.expert_tensor=1", "recompute.granularity=none")
# small batches and long sequences make batch, context and grid rules bite together
SMALL = {
    "mixtral": space_of(
        "mixtral_8x7b", 8, *ONE_TENSOR, "overlap.expert_parallel=false", seq_len=8192, global_batch_size=6
    ),
    "no experts": space_of("llama3_8b", 8, global_batch_size=12),
    "uneven GPUs": space_of(
        "qwen3_30b_a3b", 24, *ONE_TENSOR, "parallel.virtual_pipeline=2", global_batch_size=24
    ),
}
LARGE = {
    "bf16": space_of("deepseek_v3", 256, global_batch_size=2048),
    "fp8": space_of("deepseek_v3", 1024, precision="fp8_blockwise", seq_len=16384, global_batch_size=1024),
    "graphs": space_of("qwen3_235b_a22b", 256, "cuda_graphs.implementation=transformer_engine"),
    "blackwell": space_of("kimi_k2", 256, system="gb300_nvl72"),
}


@pytest.mark.parametrize("name", SMALL)
def test_every_layout_of_a_small_space_is_judged_as_the_rules_judge_it(name: str) -> None:
    space = SMALL[name]
    legality = Legality(space)
    found = {(*family, split) for family, splits in legality.legal_families() for split in splits}
    expected, refused = set(), 0
    for indices in product(*map(range, space.sizes)):
        if legality_problems(space.recipe(indices)):
            refused += 1
        else:
            expected.add(indices)
    assert found == expected
    assert expected
    assert sum(legality.refused.values()) == refused


@pytest.mark.parametrize("name", LARGE)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_layout_of_a_large_space_is_judged_as_the_rules_judge_it(name: str, data: st.DataObject) -> None:
    space = LARGE[name]
    indices = tuple(data.draw(st.integers(0, size - 1)) for size in space.sizes)
    assert LEGALITIES[name].is_legal(indices) == (not legality_problems(space.recipe(indices)))


LEGALITIES = {name: Legality(space) for name, space in LARGE.items()}


def test_a_layout_counts_for_the_first_rule_that_refuses_it() -> None:
    space: Space = space_of("qwen3_30b_a3b", 24, "parallel.expert=7")
    legality = Legality(space)
    assert list(legality.legal_families()) == []
    assert sum(legality.refused.values()) == space.num_layouts
    assert legality.refused["experts_per_rank"] > 0
    example = legality.examples["experts_per_rank"]
    recipe = space.recipe((*example, *(0 for _ in space.sizes[len(example) :])))
    assert "experts_per_rank" in {problem.rule for problem in legality_problems(recipe)}
