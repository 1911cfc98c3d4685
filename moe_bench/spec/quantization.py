"""What `quantize` is asked: a recipe's model in one process, a format, and what calibrates and judges it."""

from __future__ import annotations

from typing import Literal

from moe_bench.errors import BadInputError
from moe_bench.spec.base import PositiveInt, Spec
from moe_bench.spec.derive_training import Wishes, training_job, training_plan
from moe_bench.spec.derive_verify import LAYOUTS
from moe_bench.spec.recipe import KernelSpec, Overlap, Recompute
from moe_bench.spec.scale import Plan, differences
from moe_bench.spec.training import TrainingJob

QuantFormat = Literal["fp8", "nvfp4", "mxfp4"]

_ONE_PROCESS = {**LAYOUTS["1 process"], "data_sharding": "distributed_optimizer"}
_REASONS = {
    "parallel": "one process",
    "kernels": "modelopt quantises linear modules, one for each expert",
    "overlap": "one process",
    "recompute": "nothing is trained",
}


class QuantizeJob(Spec):
    """Everything that decides what a quantisation computes."""

    plan: Plan
    format: QuantFormat
    experts_only: bool = False
    """Routed experts alone; attention, shared experts and dense layers stay as they are."""
    text: TrainingJob | None = None
    """Where calibration and evaluation batches come from; None for random tokens."""
    num_calibration_batches: PositiveInt
    """Global batches."""
    num_evaluation_batches: PositiveInt


def quantize_job(
    plan: Plan,
    *,
    format: QuantFormat,
    experts_only: bool,
    data: str | None,
    num_calibration_batches: int,
    num_evaluation_batches: int,
) -> QuantizeJob:
    """The quantisation of `plan`'s toy in one process; every substitution is listed in its plan.

    Raises BadInputError for another scale, and for experts with biases, which are no linear modules.
    """
    if plan.scale != "smoke":
        raise BadInputError(
            f"{plan.recipe.name}: quantize runs toys in one process so far; add --scale smoke"
        )
    if plan.recipe.model.moe is not None and plan.recipe.model.linear_bias:
        raise BadInputError(
            f"{plan.recipe.model.key}: its experts have biases, and Megatron-Core has no experts of linear "
            "modules with biases for modelopt to quantise; name another model"
        )
    alone = _in_one_process(training_plan(plan))
    wishes = Wishes(
        data=data, num_steps=num_calibration_batches, num_validation_batches=num_evaluation_batches
    )
    return QuantizeJob(
        plan=alone,
        format=format,
        experts_only=experts_only,
        text=None if data is None else training_job(alone, wishes, before=None),
        num_calibration_batches=num_calibration_batches,
        num_evaluation_batches=num_evaluation_batches,
    )


def _in_one_process(plan: Plan) -> Plan:
    before = plan.recipe
    recipe = before.model_copy(
        update={
            "parallel": before.parallel.model_copy(update=_ONE_PROCESS),
            "kernels": KernelSpec(family="torch_native", grouped_gemm=False),
            "overlap": Overlap(),
            "recompute": Recompute(),
        }
    )
    rows = {row.field: row for row in plan.substitutions}
    for row in differences(before, recipe, _REASONS):
        asked = rows[row.field].asked if row.field in rows else row.asked
        rows[row.field] = row.model_copy(update={"asked": asked})
    return plan.model_copy(update={"recipe": recipe, "substitutions": tuple(rows.values())})
