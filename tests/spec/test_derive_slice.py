"""One rank of a recipe: layers of its stage, sizes that stay, and what is said of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.analysis.memory import rank_fits
from moe_bench.errors import BadInputError
from moe_bench.spec.catalogue import find_recipe, recipe_paths, recipes_root
from moe_bench.spec.derive_slice import SliceChoice, slice_plan, tiny_slice_plan
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import KernelFamily, Recipe, Routing
from moe_bench.spec.scale import Plan

LOADER = Loader(root=recipes_root())
HOST = LOADER.system("cpu_host")
PATHS = recipe_paths(recipes_root())


def recipe_of(name: str) -> Recipe:
    return LOADER.recipe(find_recipe(name, LOADER))


def slice_of(recipe: Recipe) -> Plan:
    return slice_plan(recipe, fits=lambda _, __: True, modified=())


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_slice_of_every_recipe_is_legal_and_keeps_the_work_of_a_rank(path: Path) -> None:
    asked = LOADER.recipe(path)
    plan = slice_plan(asked, fits=rank_fits, modified=())
    cut = plan.recipe
    assert list(legality_problems(cut)) == []
    # with its own kernels every shipped recipe fits as it is
    assert (cut.model, cut.parallel) == (asked.model, asked.parallel)
    for name in ("system", "precision", "low_precision", "kernels", "optimizer", "recompute", "seq_len"):
        assert getattr(cut, name) == getattr(asked, name)
    assert cut.micro_batch_size == asked.micro_batch_size
    assert cut.num_micro_batches >= min(asked.parallel.pipeline, asked.num_micro_batches)
    assert (plan.is_slice, plan.num_ranks) == (True, 1)
    assert {row.field.partition(".")[0] for row in plan.substitutions} <= {
        *("global_batch_size", "dispatch", "routing", "overlap", "cuda_graphs", "steps", "env", "ranks"),
        *("offload", "mcore"),
    }


@pytest.mark.parametrize("family", ["torch_native", "quack"])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_other_kernels_are_legal_and_everything_that_they_replace_is_a_row(
    path: Path, family: KernelFamily
) -> None:
    asked = LOADER.recipe(path)
    plan = slice_plan(asked, fits=rank_fits, modified=(), choice=SliceChoice(kernels=family))
    problems = {problem.rule for problem in legality_problems(plan.recipe)}
    # What would be another model or other work is not replaced, and `run` refuses the slice.
    others = {"quack_activation", "quack_experts", "quack_rows", "residual_experts"}
    assert problems <= (others if family == "quack" else set())
    assert plan.recipe.kernels.family == family
    keeps = asked.precision == "bf16" or (asked.precision, family) == ("fp8_rowwise", "torch_native")
    assert plan.recipe.precision == (asked.precision if keeps else "bf16")
    rows = {row.field: row.used for row in plan.substitutions}
    assert rows.get("kernels.family", asked.kernels.family) == family
    assert ("precision" in rows) == (not keeps)
    # whoever carries the tokens of the job, those of the slice go through loopback groups
    assert plan.recipe.kernels.fusions.permute
    assert plan.whole is not None
    assert "flex_permutation" not in {problem.rule for problem in legality_problems(plan.whole)}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_tiny_slice_of_every_recipe_is_legal(path: Path) -> None:
    plan = tiny_slice_plan(LOADER.recipe(path), host=HOST, modified=())
    assert list(legality_problems(plan.recipe)) == []
    assert plan.recipe.system.gpu is None
    assert plan.num_ranks == 1


def test_the_stage_is_the_first_with_the_most_experts_and_its_first_rank_runs() -> None:
    asked = recipe_of("deepseek_v3/h100_sxm_256g_bf16")
    # Et|(tt|)*30L over 4 ranks: 15 layers with the embedding, of which 3 dense, then 16 (2 dense), 16, 14
    assert (asked.parallel.layout, asked.parallel.pipeline) == ("Et|(tt|)*30L", 4)
    plan = slice_of(asked)
    assert (plan.rank, plan.pipeline_rank) == (128, 2)
    assert plan.substitutions[-1].used == "rank 128, stage 2 of 4: 16 layers, 16 with experts"


def test_a_stage_can_be_named() -> None:
    asked = recipe_of("deepseek_v3/h100_sxm_256g_bf16")
    plan = slice_plan(asked, fits=lambda _, __: True, modified=(), choice=SliceChoice(stage=3))
    assert (plan.rank, plan.pipeline_rank) == (192, 3)
    with pytest.raises(BadInputError, match="--stage 4: the recipe has stages 0 to 3"):
        slice_plan(asked, fits=lambda _, __: True, modified=(), choice=SliceChoice(stage=4))


def test_a_recording_runs_the_rank_whose_experts_receive_most() -> None:
    asked = recipe_of("qwen3_30b_a3b")
    # 128 experts over EP16, eight each: 80 to 95 are those of ranks 10 and 11
    layer = tuple(30 if 80 <= expert < 96 else 10 for expert in range(128))
    choice = SliceChoice(routing=Routing(mode="recorded", trace=(layer,)))
    plan = slice_plan(asked, fits=lambda _, __: True, modified=(), choice=choice)
    assert list(legality_problems(plan.recipe)) == []
    assert plan.rank == 10
    assert {row.field: row.used for row in plan.substitutions}["routing.mode"] == "recorded"


def test_layers_that_do_not_fit_are_left_out_chunk_by_chunk_and_the_count_is_a_row() -> None:
    asked = recipe_of("deepseek_v3/h100_sxm_256g_bf16")
    plan = slice_plan(asked, fits=lambda cut, _: cut.model.num_layers <= 52, modified=())
    rows = {row.field: (row.asked, row.used) for row in plan.substitutions}
    assert rows["model.num_layers"] == ("61", "52")
    own = [chunk for chunk in plan.recipe.chunks() if chunk.pipeline_rank == plan.pipeline_rank]
    # 9 of 16 layers in 8 chunks of two: every chunk lost one, and one its second
    assert sorted(len(chunk.layers) for chunk in own) == [0, 1, 1, 1, 1, 1, 1, 1]
    assert rows["ranks"][1].endswith("7 layers, 7 with experts")
    assert list(legality_problems(plan.recipe)) == []


def test_two_expert_layers_are_the_least() -> None:
    asked = recipe_of("deepseek_v3/h100_sxm_256g_bf16")
    with pytest.raises(BadInputError, match="not even 2 expert layers"):
        slice_plan(asked, fits=lambda _, __: False, modified=())


def test_a_model_without_experts_has_no_slice() -> None:
    asked = recipe_of("qwen3_30b_a3b")
    dense = asked.model.model_copy(update={"moe": None})
    with pytest.raises(BadInputError, match="has none"):
        slice_of(asked.model_copy(update={"model": dense}))


def test_a_tiny_slice_refuses_kernels_that_need_a_gpu() -> None:
    asked = recipe_of("qwen3_30b_a3b")
    with pytest.raises(BadInputError, match="--kernels quack: a tiny_slice runs on a CPU"):
        tiny_slice_plan(asked, host=HOST, modified=(), choice=SliceChoice(kernels="quack"))
