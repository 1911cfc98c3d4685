"""Recomputation that a row must have used because it would not have fitted without."""

from __future__ import annotations

from dataclasses import replace

from moe_bench.projection.rows.inference import InferredRun, infer
from moe_bench.projection.rows.recompute import MEMORY_RULE, settings, with_recompute
from moe_bench.spec.recipe import Recipe, Recompute
from tests.projection.published_rows import CATALOGUE, ROWS, inferred, rule_of

ZOO = {"framework": "Megatron-LM (ModelZoo)", "version": "2026-05-13", "source": {}}


def fits_with(wanted: Recompute) -> InferredRun:
    """A row of ModelZoo on a GPU that holds it with `wanted` alone."""

    def cannot_fit(recipe: Recipe) -> bool:
        return recipe.recompute != wanted

    return with_recompute(inferred(**ZOO), cannot_fit)


def test_the_first_setting_that_fits_is_taken() -> None:
    wanted = Recompute(granularity="selective", modules=("moe_act", "layernorm"))
    run = fits_with(wanted)
    assert run.recipe.recompute == wanted
    assert rule_of(run, "recompute") == MEMORY_RULE
    assert [one.value for one in run.assumptions if one.field == "recompute"] == ["moe_act+layernorm"]


def test_full_recomputation_is_the_last_resort() -> None:
    assert fits_with(Recompute(granularity="full", num_layers=1)).recipe.recompute.granularity == "full"


def test_what_fits_is_left_alone() -> None:
    run = inferred(**ZOO)
    assert with_recompute(run, lambda _: False) is run


def test_what_never_fits_is_left_alone() -> None:
    run = inferred(**ZOO)
    assert with_recompute(run, lambda _: True) is run


def test_printed_recomputation_is_left_alone() -> None:
    for columns in ({**ZOO, "recompute": "none"}, {**ZOO, "recompute": ("layernorm",)}):
        run = inferred(**columns)
        assert with_recompute(run, lambda _: True) is run


def test_the_code_of_the_release_is_believed() -> None:
    run = inferred()
    assert rule_of(run, "recompute") == "recomputation in Bridge's configuration"
    assert with_recompute(run, lambda recipe: recipe.recompute.granularity == "none") is run


def test_automodel_recomputes_all_or_nothing() -> None:
    run = inferred(framework="NeMo Automodel", version="2026-06-08", sharding="fsdp2", source={})
    assert [one.granularity for one in settings(run)] == ["full"]


def test_modules_are_those_that_the_model_has() -> None:
    run = inferred(**ZOO)
    dense = replace(run, recipe=inferred(**ZOO, model="Llama3-8B", ep=None).recipe)
    assert [one.modules for one in settings(run)][-2] == ("moe_act", "layernorm", "moe")
    assert [one.modules for one in settings(dense)][-2] == ("layernorm", "mlp")


def test_four_rows_need_recomputation_that_they_do_not_print() -> None:
    found = []
    for row in ROWS:
        run = infer(row, CATALOGUE)
        if isinstance(run, InferredRun) and with_recompute(run) is not run:
            found.append(row.model)
    assert found == ["GLM-5.2", "Llama3-70B", "Nemotron-3-Nano-30B-A3B", "Nemotron-3-Super-120B-A12B"]
