"""What `quantize` is asked: a recipe's model, a format, and what calibrates and judges it."""

from __future__ import annotations

from moe_bench.errors import BadInputError, MissingRequirementError
from moe_bench.spec.base import PositiveInt, Spec
from moe_bench.spec.derive_training import Wishes, training_job, training_plan
from moe_bench.spec.kernel_family import with_kernels
from moe_bench.spec.legality import legality_problems
from moe_bench.spec.recipe import (
    Arithmetic,
    CudaGraphs,
    QuantFormat,
    QuantizationSpec,
    Recipe,
    Recompute,
)
from moe_bench.spec.scale import Plan, differences
from moe_bench.spec.training import TrainingJob

_NOT_TRAINED = "nothing is trained"
_PACKED = "torch-native layers alone hold packed weights, which --arithmetic asks for"
_REASONS = {
    "quantization": "asked on the command line",
    "kernels": "modelopt's loop over experts takes no tensor ranks beside expert ranks; nothing is trained",
    "recompute": _NOT_TRAINED,
    "overlap": _NOT_TRAINED,
    "cuda_graphs": _NOT_TRAINED,
}
_MOVED_REASONS = _REASONS | dict.fromkeys(("kernels", "parallel", "offload", "optimizer", "mcore"), _PACKED)


class QuantizeJob(Spec):
    """Everything that decides what a quantisation computes."""

    plan: Plan
    """Of a recipe with `quantization`."""
    is_calibrated: bool
    """Whether the checkpoint is one of quantisation-aware training, which holds the scales."""
    text: TrainingJob | None = None
    """Where calibration and evaluation batches come from; None for random tokens."""
    num_evaluation_batches: PositiveInt
    """Global batches."""
    arithmetic: Arithmetic

    @property
    def asked(self) -> QuantizationSpec:
        """The format and what of the model has it."""
        asked = self.plan.recipe.quantization
        if asked is None:
            raise ValueError(f"{self.plan.recipe.name}: no quantization in the plan of a quantisation")
        return asked


def quantize_job(
    plan: Plan,
    *,
    format: QuantFormat | None,
    experts_only: bool,
    arithmetic: Arithmetic,
    data: str | None,
    num_calibration_batches: int,
    num_evaluation_batches: int,
) -> QuantizeJob:
    """The quantisation of `plan`'s model in its layout; every substitution is listed in its plan.

    `format` None takes that of the recipe, whose checkpoint then holds the scales. Raises BadInputError where
    the two contradict each other, for a slice, and where a rule on `quantization` forbids the recipe;
    MissingRequirementError for an arithmetic that the format has not, or not on the recipe's GPU.
    """
    if plan.is_slice:
        raise BadInputError(f"{plan.recipe.name}: one rank has no logits; leave --scale {plan.scale} out")
    learned = plan.recipe.quantization
    asked = _asked(plan.recipe, format, experts_only, num_calibration_batches)
    quantised = _quantised(training_plan(plan), asked, arithmetic)
    if arithmetic == "real":
        _require_real_products(quantised.recipe, asked.format)
    wishes = Wishes(
        data=data, num_steps=asked.num_calibration_batches, num_validation_batches=num_evaluation_batches
    )
    return QuantizeJob(
        plan=quantised,
        is_calibrated=learned is not None,
        text=None if data is None else training_job(quantised, wishes, before=None),
        num_evaluation_batches=num_evaluation_batches,
        arithmetic=arithmetic,
    )


def _require_real_products(recipe: Recipe, format: QuantFormat) -> None:
    """Raise what keeps `recipe` from multiplying in `format`."""
    instead = "leave it at simulated, or pack the weights with --arithmetic packed"
    if format != "fp8":
        raise MissingRequirementError(
            f"--arithmetic real: no {format} product is wired up: torch's grouped one needs compute "
            "capability 10.0 and block scales that are padded and swizzled for each expert, which nobody has "
            f"run here; {instead}"
        )
    gpu = recipe.system.gpu
    if gpu is None or gpu.architecture != "hopper":
        found = "no GPU" if gpu is None else f"a {gpu.architecture} GPU"
        raise MissingRequirementError(
            f"--arithmetic real: {recipe.system.key} has {found}, and torch compiles its grouped FP8 product "
            f"for Hopper alone; {instead}"
        )
    if recipe.precision != "bf16":
        raise BadInputError(
            f"--arithmetic real: FP8 products have BF16 results, and precision is {recipe.precision}; "
            f"{instead}"
        )


def _asked(
    recipe: Recipe, format: QuantFormat | None, experts_only: bool, num_calibration_batches: int
) -> QuantizationSpec:
    learned = recipe.quantization
    if learned is None:
        if format is None:
            raise BadInputError("--format: which one? name fp8, nvfp4 or mxfp4")
        return QuantizationSpec(
            format=format, experts_only=experts_only, num_calibration_batches=num_calibration_batches
        )
    if format not in (None, learned.format) or (experts_only and not learned.experts_only):
        raise BadInputError(
            f"{recipe.name} has learned with {learned.format}"
            f"{' of its experts only' if learned.experts_only else ''}; leave --format and --experts-only out"
        )
    return learned


def _quantised(plan: Plan, asked: QuantizationSpec, arithmetic: Arithmetic) -> Plan:
    before = plan.recipe
    is_moved = arithmetic != "simulated" and before.kernels.family == "transformer_engine"
    # another precision is left for the rules to refuse
    is_moved = is_moved and before.precision in ("bf16", "fp32")
    on_kernels = with_kernels(before, "torch_native") if is_moved else before
    fusions = on_kernels.kernels.fusions.model_copy(update={"gradient_accumulation": False})
    recipe = on_kernels.model_copy(
        update={
            "quantization": asked,
            "kernels": on_kernels.kernels.model_copy(update={"grouped_gemm": True, "fusions": fusions}),
            "recompute": Recompute(),
            "overlap": on_kernels.overlap.model_copy(
                update={"delayed_wgrad": False, "expert_parallel": False}
            ),
            "cuda_graphs": CudaGraphs(),
        }
    )
    for problem in legality_problems(recipe):
        if (problem.rule or "").startswith("quantized_"):
            key = ".".join(map(str, problem.path))
            raise BadInputError(f"{before.name}: {key}: {problem.problem}; {problem.fix}")
    rows = {row.field: row for row in plan.substitutions}
    for row in differences(before, recipe, _MOVED_REASONS if is_moved else _REASONS):
        asked_before = rows[row.field].asked if row.field in rows else row.asked
        rows[row.field] = row.model_copy(update={"asked": asked_before})
    return plan.model_copy(update={"recipe": recipe, "substitutions": tuple(rows.values())})
