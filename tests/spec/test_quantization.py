"""What can be quantised, and what is said about the rest."""

from __future__ import annotations

from typing import Any

import pytest

from moe_bench.cli import main
from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.quantization import QuantizeJob, quantize_job
from moe_bench.spec.recipe import QuantizationSpec

FP32 = ("optimizer.gradient_dtype=fp32",)
LEARNED = (
    "quantization.format=nvfp4",
    "kernels.fusions.gradient_accumulation=false",
    "cuda_graphs={}",
)


def job_of(recipe: str, *changes: str, scale: ScaleOption = ScaleOption.SMOKE, **asked: Any) -> QuantizeJob:
    asked = {"format": "fp8", "experts_only": False, "arithmetic": "simulated"} | asked
    plan = plan_of(recipe, scale=scale, num_gpus=None, changes=list(changes), rounds=True)
    return quantize_job(plan, data=None, num_calibration_batches=1, num_evaluation_batches=1, **asked)


@pytest.mark.parametrize(
    "recipe", ["deepseek_v3", "qwen3_30b_a3b", "mixtral_8x7b", "olmoe_1b_7b", "gpt_oss_20b"]
)
@pytest.mark.parametrize("scale", [ScaleOption.SMOKE, ScaleOption.FULL])
def test_every_layout_is_kept_and_what_only_training_has_is_left(recipe: str, scale: ScaleOption) -> None:
    asked = plan_of(recipe, scale=scale, num_gpus=None, changes=None)
    plan = job_of(recipe, scale=scale).plan
    assert [problem.rule for problem in legality_problems(plan.recipe)] == []
    assert plan.recipe.parallel == asked.recipe.parallel
    rows = {row.field: row.used for row in plan.substitutions}
    assert rows["quantization.format"] == "fp8"


def test_a_recipe_that_learned_with_quantisers_keeps_them() -> None:
    job = job_of("qwen3_30b_a3b", *LEARNED, format=None)
    assert job.is_calibrated
    assert job.asked == QuantizationSpec(format="nvfp4")
    with pytest.raises(BadInputError, match="has learned with nvfp4"):
        job_of("qwen3_30b_a3b", *LEARNED, format="fp8")


def test_a_format_has_to_be_named_where_the_recipe_has_none() -> None:
    with pytest.raises(BadInputError, match="--format: which one"):
        job_of("qwen3_30b_a3b", format=None)


def test_a_slice_has_no_logits() -> None:
    with pytest.raises(BadInputError, match="one rank has no logits"):
        job_of("qwen3_30b_a3b", scale=ScaleOption.TINY_SLICE)


def test_kernels_that_modelopt_does_not_know_are_refused_with_the_rule_s_words() -> None:
    with pytest.raises(BadInputError, match=r"kernels.family: quack with quantization.*; use torch_native"):
        job_of("olmoe_1b_7b/h100_sxm_8g_bf16_quack", scale=ScaleOption.FULL)


@pytest.mark.parametrize("arithmetic", ["packed", "real"])
@pytest.mark.parametrize("recipe", ["deepseek_v3", "qwen3_30b_a3b", "gpt_oss_120b", "olmoe_1b_7b"])
def test_layers_that_hold_packed_weights_take_the_place_of_others(recipe: str, arithmetic: str) -> None:
    plan = job_of(recipe, scale=ScaleOption.FULL, arithmetic=arithmetic).plan
    assert [problem.rule for problem in legality_problems(plan.recipe)] == []
    assert plan.recipe.kernels.family == "torch_native"
    rows = {row.field: (row.asked, row.used) for row in plan.substitutions}
    assert rows["kernels.family"] == ("transformer_engine", "torch_native")


BLACKWELL = ("qwen3_30b_a3b/b200_8g_mxfp8", "precision=bf16", "low_precision=null")


@pytest.mark.parametrize(
    ("recipe", "asked", "problem"),
    [
        (("qwen3_30b_a3b",), {"scale": ScaleOption.SMOKE}, "cpu_host has no GPU"),
        (BLACKWELL, {}, "a blackwell GPU, .* for Hopper alone"),
        (("qwen3_30b_a3b",), {"format": "nvfp4"}, "no nvfp4 product is wired up"),
        (("qwen3_30b_a3b",), {"format": "mxfp4"}, "no mxfp4 product is wired up"),
    ],
)
def test_real_products_are_refused_where_none_run(
    recipe: tuple[str, ...], asked: dict[str, Any], problem: str
) -> None:
    asked = {"scale": ScaleOption.FULL, "arithmetic": "real"} | asked
    with pytest.raises(MissingRequirementError, match=f"{problem}.*--arithmetic packed"):
        job_of(*recipe, **asked)


def test_products_with_bf16_results_are_not_those_of_an_fp32_model() -> None:
    with pytest.raises(BadInputError, match="precision is fp32"):
        job_of("olmoe_1b_7b", "precision=fp32", *FP32, scale=ScaleOption.FULL, arithmetic="real")


def test_verbs_that_know_no_quantisers_refuse_a_recipe_that_has_some() -> None:
    with pytest.raises(BadInputError, match="add --set quantization=null"):
        plan_of("qwen3_30b_a3b", scale=ScaleOption.SMOKE, num_gpus=None, changes=list(LEARNED))
    undone = [*LEARNED, "quantization=null"]
    assert plan_of("qwen3_30b_a3b", scale=ScaleOption.SMOKE, num_gpus=None, changes=undone)


def test_a_projection_counts_no_quantisers_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    changes = [argument for change in LEARNED for argument in ("--set", change)]
    assert main(["project", "qwen3_30b_a3b", *changes]) == 2
    assert "add --set quantization=null" in capsys.readouterr().err
