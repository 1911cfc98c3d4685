"""No layout is projected to be faster, or leaner, than its lower bounds say."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_bench.analysis.memory import pipeline_memory
from moe_bench.projection.constants import Constants
from moe_bench.projection.search.bound import StepBound
from moe_bench.projection.search.layout import Axis
from moe_bench.projection.search.memory import MemoryBound
from moe_bench.projection.step import project
from tests.projection.search_spaces import legal_families, space_of

WHOLE = "parallel.expert_tensor=1"
DEEPEP = "dispatch.dispatcher=deepep"
NO_OVERLAP = "overlap.expert_parallel=false"
SPACES = {
    "overlap and MTP": space_of("deepseek_v3", 256, WHOLE, DEEPEP, global_batch_size=2048),
    "fp8": space_of("deepseek_v3", 256, WHOLE, DEEPEP, precision="fp8_blockwise", global_batch_size=1024),
    "graphs": space_of("qwen3_30b_a3b", 32, WHOLE),
    "natural routing": space_of("qwen3_30b_a3b", 16, "routing.mode=natural", micro_batch_sizes=(1,)),
    "no experts": space_of("llama3_8b", 16, global_batch_size=64),
    "context": space_of(
        "mixtral_8x7b",
        64,
        WHOLE,
        NO_OVERLAP,
        "dispatch.dispatcher=alltoall",
        seq_len=32768,
        global_batch_size=32,
    ),
    "fsdp": space_of("mixtral_8x7b", 32, "parallel.data_sharding=megatron_fsdp", global_batch_size=64),
    "blackwell": space_of("qwen3_235b_a22b", 64, WHOLE, DEEPEP, system="gb200_nvl72"),
}
STEP = {name: StepBound(space, Constants()) for name, space in SPACES.items()}
MEMORY = {name: MemoryBound(space) for name, space in SPACES.items()}
LEGAL = {name: legal_families(space) for name, space in SPACES.items()}
ROUNDING = 1e-9


def drawn(data: st.DataObject, name: str) -> tuple[tuple[int, ...], int]:
    family, splits = data.draw(st.sampled_from(LEGAL[name]))
    return family, data.draw(st.sampled_from(splits))


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_projected_step_takes_at_least_its_bounds(name: str, data: st.DataObject) -> None:
    family, split = drawn(data, name)
    step_s = project(SPACES[name].recipe((*family, split))).step_s
    own_s = STEP[name].of_family(family)[split]
    [[without_recompute_s]] = STEP[name].of_group([family], [split])
    assert without_recompute_s <= own_s * (1 + ROUNDING)
    assert own_s < STEP[name].with_traffic_s((*family, split), own_s) <= step_s * (1 + ROUNDING)


@pytest.mark.parametrize("name", SPACES)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_the_fullest_rank_holds_at_least_its_bound(name: str, data: st.DataObject) -> None:
    family, split = drawn(data, name)
    held = max(rank.total_bytes for rank in pipeline_memory(SPACES[name].recipe((*family, split))))
    [[bound]] = MEMORY[name].of_group([family], [split])
    assert 0 < bound <= held * (1 + ROUNDING)


def test_bounds_of_a_group_are_those_of_its_members() -> None:
    last, splits = LEGAL["graphs"][-1]
    families = [family for family, _ in LEGAL["graphs"] if family[: Axis.EXPERT] == last[: Axis.EXPERT]][-7:]
    together = STEP["graphs"].of_group(families, splits)
    for row, family in enumerate(families):
        for column, split in enumerate(splits):
            [[alone]] = STEP["graphs"].of_group([family], [split])
            assert together[row, column] == pytest.approx(alone, rel=1e-12)
