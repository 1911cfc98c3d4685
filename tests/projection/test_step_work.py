"""What a step does once, or between its passes, counted by hand."""

from __future__ import annotations

import pytest

from moe_bench.projection.rows.inference import InferredRun, infer
from moe_bench.projection.step import project
from moe_bench.projection.step_work import num_scale_reductions
from moe_bench.spec.recipe import Recipe
from tests.projection.published_rows import CATALOGUE, ROWS


def dgxc_llama(precision: str) -> Recipe:
    """Llama 3.1 70B on 2,048 H100: four stages of five chunks, 64 micro batches."""
    name = f"dgxc-v25.02.02-llama3.1-70b-h100-2048gpu-{precision}-s8192"
    run = infer(next(row for row in ROWS if row.id == name), CATALOGUE)
    assert isinstance(run, InferredRun)
    return run.recipe


def test_delayed_scaling_reduces_its_largest_values_after_every_pass_of_a_chunk() -> None:
    recipe = dgxc_llama("fp8")
    assert recipe.precision == "fp8_delayed"
    assert num_scale_reductions(recipe) == 2 * 64 * 5
    tensor_alone = recipe.model_copy(update={"mcore": {"tp_only_amax_red": True}})
    assert num_scale_reductions(tensor_alone) == num_scale_reductions(dgxc_llama("bf16")) == 0


def test_the_waterfall_shows_what_reducing_scales_costs() -> None:
    terms = {term.name: term.seconds for term in project(dgxc_llama("fp8")).terms}
    assert terms["scaling factors"] == pytest.approx(640 * (10e-6 + 2 * 20e-6 * 6))  # 64 nodes to a stage
    assert "scaling factors" not in {term.name for term in project(dgxc_llama("bf16")).terms}
