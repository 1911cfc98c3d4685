"""What the projection says of each figure that is to be reached on one H100, before it is measured."""

from __future__ import annotations

from collections.abc import Mapping

from moe_bench.analysis.stage_flops import stage_flops
from moe_bench.projection.campaign.plan import Sources
from moe_bench.projection.campaign.wishes import LAYERS, SLICES, LayerWish, SliceWish
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.evidence.calibrated_shapes import operations_of
from moe_bench.projection.isolated_layer import isolated_parts
from moe_bench.projection.slice_step import modelled_rank
from moe_bench.results.calibration import DenseGemm, Task
from moe_bench.results.calibration_tasks import Implementation
from moe_bench.results.layer_record import gated_flops
from moe_bench.results.metrics import COUNTING
from moe_bench.results.reach import (
    ROUTING_FRACTION,
    expert_gemms,
    routing,
    slice_rate,
    suite_layer,
)
from moe_bench.results.sonicmoe import SHAPES, SonicShape
from moe_bench.spec.derive_layer import case_on, layer_recipe
from moe_bench.spec.layer_case import LayerCase
from moe_bench.spec.system import SystemSpec

DENSE_WIDTH = 8192
"""Of the large product that every run measures."""
_ROUTING = ("router", "permute and unpermute")
_PRODUCTS = ("fc1", "fc2")


def predictions(system: SystemSpec, sources: Sources) -> Mapping[str, float]:
    """By figure, on the torch-native fast path in BF16; figures that no law of kernels gives are left out."""
    found: dict[str, float] = {}
    for recipe, _ in LAYERS:
        model = recipe.split("/")[0]
        (case,) = sources.layers_of(LayerWish(recipe=recipe))
        parts = _parts(case, system)
        found[expert_gemms(model)] = _products_rate(case, parts) / _dense_rate(system)
        if model in ROUTING_FRACTION:
            found[routing(model)] = _sum(parts, *_ROUTING) / _sum(parts)
    for shape in SHAPES:
        found[suite_layer(shape)] = _suite_ratio(shape, system)
    for recipe in SLICES:
        plan = sources.slice_of(SliceWish(recipe=recipe, kernels="torch_native"))
        num_sharing = plan.recipe.parallel.num_gpus // plan.recipe.parallel.pipeline
        flops = stage_flops(plan.recipe, plan.pipeline_rank, counting=COUNTING) / num_sharing
        compute_s = (
            plan.recipe.num_micro_batches * modelled_rank(plan.recipe, plan.pipeline_rank).micro_batch_s
        )
        found[slice_rate(recipe.split("/")[0])] = flops / compute_s
    return found


def _parts(case: LayerCase, system: SystemSpec) -> Mapping[tuple[str, str], float]:
    own = case_on(case, "torch_native", system, is_grouped=True)
    return isolated_parts(layer_recipe(own, system), load=1.0)


def _sum(parts: Mapping[tuple[str, str], float], *names: str) -> float:
    """Seconds of these parts, or of all, in both passes."""
    return sum(seconds for (part, _), seconds in parts.items() if not names or part in names)


def _products_rate(case: LayerCase, parts: Mapping[tuple[str, str], float]) -> float:
    return 3 * gated_flops(case, num_rows=case.num_rows) / _sum(parts, *_PRODUCTS)


def _dense_rate(system: SystemSpec) -> float:
    what = DenseGemm(
        operation="dense_gemm", num_rows=DENSE_WIDTH, num_inner=DENSE_WIDTH, num_columns=DENSE_WIDTH
    )
    (operation,) = operations_of(Task(what=what, dtype="bf16", implementation=Implementation.MM))
    return what.num_flops / Efficiency(system).law_s(operation)


def _suite_ratio(shape: SonicShape, system: SystemSpec) -> float:
    """The smaller of both passes' ratios to the higher published rate."""
    parts = _parts(shape.case(), system)
    flops = gated_flops(shape.case(), num_rows=shape.case().num_rows)
    forward_s = sum(seconds for (_, in_pass), seconds in parts.items() if in_pass == "forward")
    rates = (shape.sonicmoe, shape.megatron)
    return min(
        flops / forward_s / max(rate.forward_flops_per_s for rate in rates),
        2 * flops / (_sum(parts) - forward_s) / max(rate.backward_flops_per_s for rate in rates),
    )
