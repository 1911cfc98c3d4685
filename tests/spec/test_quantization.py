"""What can be quantised, and what is said about the rest."""

from __future__ import annotations

import pytest

from moe_bench.cli.options import ScaleOption, plan_of
from moe_bench.errors import BadInputError
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.quantization import QuantizeJob, quantize_job


def job_of(recipe: str, scale: ScaleOption = ScaleOption.SMOKE) -> QuantizeJob:
    return quantize_job(
        plan_of(recipe, scale=scale, num_gpus=None, changes=[]),
        format="fp8",
        experts_only=False,
        data=None,
        num_calibration_batches=1,
        num_evaluation_batches=1,
    )


@pytest.mark.parametrize("recipe", ["deepseek_v3", "qwen3_30b_a3b", "mixtral_8x7b", "olmoe_1b_7b"])
def test_the_toy_is_legal_runs_in_one_process_and_lists_what_changed(recipe: str) -> None:
    plan = job_of(recipe).plan
    assert list(legality_problems(plan.recipe)) == []
    assert plan.recipe.parallel.num_gpus == 1
    rows = {row.field: row.used for row in plan.substitutions}
    assert rows["kernels.grouped_gemm"] == "False"


def test_another_scale_is_refused() -> None:
    with pytest.raises(BadInputError, match="add --scale smoke"):
        job_of("qwen3_30b_a3b", ScaleOption.FULL)


def test_experts_with_biases_are_refused() -> None:
    with pytest.raises(BadInputError, match="biases"):
        job_of("gpt_oss_20b")
