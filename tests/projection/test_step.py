"""One recipe alone and many together are the same steps, and the waterfall is the whole of each."""

from __future__ import annotations

import pytest

from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.schedule.shape import ScheduleError, ScheduleKind
from moe_bench.projection.step import Projection, project, with_schedules
from moe_bench.projection.step_time import step_times
from moe_bench.projection.step_work import step_work
from moe_bench.projection.work.load import popularity_load, power_law
from moe_bench.spec.catalogue import find_recipe, recipe_paths, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe, TokenDrop

LOADER = Loader(root=recipes_root(), rules=())
NAMES = ("deepseek_v3", "qwen3_30b_a3b", "mixtral_8x22b", "deepseek_v3/gb300_nvl72_256g_mxfp8")
RECIPES = [LOADER.recipe(find_recipe(name, LOADER)) for name in NAMES]


def test_simulating_many_pipelines_together_gives_what_each_has_alone() -> None:
    constants = Constants()
    together = step_times(with_schedules([step_work(one) for one in RECIPES], constants), constants).step_s
    assert together == pytest.approx([project(one, constants=constants).step_s for one in RECIPES], rel=1e-9)


@pytest.mark.parametrize(
    "path", recipe_paths(recipes_root()), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_the_terms_of_every_recipe_sum_to_its_step(path: object) -> None:
    projection = project(LOADER.recipe(path))
    assert sum(term.seconds for term in projection.terms) == pytest.approx(projection.step_s, rel=1e-9)
    assert all(term.seconds > 0 for term in projection.terms)


def test_the_kernels_by_pass_are_the_kernels_by_part() -> None:
    projection = project(RECIPES[0])
    traffic = ("exposed", "tensor parallel", "context parallel", "host", "pipeline", "weight", "gradient")
    others = (*traffic, "parameter gathering", "optimizer", "stragglers")
    kernels_s = sum(term.seconds for term in projection.terms if not term.name.startswith(others))
    assert sum(projection.passes_s.values()) == pytest.approx(kernels_s, rel=1e-9)


ONE_CHUNK = LOADER.recipe(
    find_recipe("deepseek_v3", LOADER),
    changes=("parallel.virtual_pipeline=1", "parallel.layout=Et*16|t*15|t*15|t*15L", "overlap.p2p=false"),
)
TWO_CHUNKS = LOADER.recipe(
    find_recipe("deepseek_v3", LOADER),
    changes=("parallel.virtual_pipeline=2", "parallel.layout=Et*8|t*8|t*8|t*8|t*8|t*8|t*7|t*6L"),
)


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (ONE_CHUNK, ScheduleKind.ONE_F_ONE_B),
        (ONE_CHUNK, ScheduleKind.ZERO_BUBBLE_H1),
        (TWO_CHUNKS, ScheduleKind.ZERO_BUBBLE_V),
        (TWO_CHUNKS, ScheduleKind.DUAL_PIPE_V),
    ],
)
def test_another_schedule_keeps_the_waterfall_whole(recipe: Recipe, kind: ScheduleKind) -> None:
    projection = project(recipe, schedule=kind)
    assert projection.timeline is not None
    assert projection.timeline.shape.kind is kind
    assert sum(term.seconds for term in projection.terms) == pytest.approx(projection.step_s, rel=1e-9)
    assert all(term.seconds > 0 for term in projection.terms)


def test_weight_gradients_in_the_flush_shorten_it() -> None:
    own, zero_bubble = project(ONE_CHUNK), project(ONE_CHUNK, schedule=ScheduleKind.ZERO_BUBBLE_H1)
    named = project(ONE_CHUNK, schedule=ScheduleKind.ONE_F_ONE_B)
    assert named.step_s == own.step_s
    assert zero_bubble.step_s < 0.95 * own.step_s
    assert zero_bubble.passes_s == own.passes_s


def test_two_micro_batches_at_once_hide_the_dispatch() -> None:
    def exposed_s(projection: Projection) -> float:
        return sum(term.seconds for term in projection.terms if term.name.startswith("exposed"))

    merged = project(TWO_CHUNKS, schedule=ScheduleKind.DUAL_PIPE_V)
    assert exposed_s(merged) < 0.5 * exposed_s(project(TWO_CHUNKS))


def test_a_schedule_needs_its_own_number_of_chunks() -> None:
    with pytest.raises(ScheduleError, match="it has 2 chunks per rank"):
        project(RECIPES[0], schedule=ScheduleKind.ZERO_BUBBLE_V)
    with pytest.raises(ScheduleError, match="one pipeline rank: nothing is scheduled"):
        project(RECIPES[1], schedule=ScheduleKind.ZERO_BUBBLE_H1)


def test_a_skew_of_zero_is_the_balanced_step_and_more_skew_is_never_faster() -> None:
    recipe = RECIPES[1]
    assert recipe.model.moe is not None
    num_experts = recipe.model.moe.num_experts
    steps_s = [
        project(recipe, load=popularity_load(recipe, power_law(num_experts, alpha))).step_s
        for alpha in (0.0, 0.1, 0.2, 0.5, 1.0)
    ]
    assert steps_s[0] == pytest.approx(project(recipe, load=1.0).step_s, rel=1e-9)
    assert steps_s == sorted(steps_s)


@pytest.mark.parametrize("is_padded", [True, False])
def test_a_larger_capacity_is_never_faster(is_padded: bool) -> None:
    plain = RECIPES[1]
    assert plain.model.moe is not None
    alltoall = plain.dispatch.model_copy(update={"dispatcher": "alltoall"})
    skew = power_law(plain.model.moe.num_experts, 0.5)
    steps_s = []
    for factor in (1.0, 1.5, 2.0, 3.0, 5.0):
        drop = TokenDrop(capacity_factor=factor, pad_to_capacity=is_padded)
        recipe = plain.model_copy(update={"token_drop": drop, "dispatch": alltoall})
        steps_s.append(project(recipe, load=popularity_load(recipe, skew)).step_s)
    assert steps_s == sorted(steps_s)
    assert steps_s[-1] > steps_s[0]


def test_a_machine_without_gpus_and_a_format_without_rates_are_refused() -> None:
    host = RECIPES[1].model_copy(update={"system": LOADER.system("cpu_host")})
    with pytest.raises(BadInputError):
        project(host)
    with pytest.raises(BadInputError):
        project(RECIPES[1].model_copy(update={"precision": "fp32"}))
