"""A MoE layer timed alone: what separates it from the same layer inside a long training step.

Alone, kernels run at their burst rate, nothing waits for another rank, and the host is ahead. So the ratio
of a layer in a step to the layer alone is that of the constants: `Constants.sustained_fraction` against 1,
`memory_fraction` against what one kernel reaches, and the stragglers of a step.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe_bench.analysis.layer_comms import expert_exchanges, runs_quantized, tensor_parallel
from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.evidence.rates import MEMORY_HBM_FRACTION
from moe_bench.projection.fabric import Fabric
from moe_bench.projection.layer_time import layer_times
from moe_bench.projection.pricing import LayerSetting, Pricer, stack
from moe_bench.projection.work.experts import add_experts
from moe_bench.projection.work.lowering import messages_of
from moe_bench.projection.work.operations import LayerWork, Number, Part
from moe_bench.projection.work.tally import NUMBERS, Tally
from moe_bench.spec.recipe import Recipe

BURST = Constants(
    sustained_fraction=1.0,
    sustained_attention_fraction=1.0,
    memory_fraction=MEMORY_HBM_FRACTION,
    launch_s=0.0,
)
"""Constants of a layer alone: rates as microbenchmarks measure them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSeconds:
    """One MoE layer and micro batch on one rank: router, dispatch, experts, shared experts and combine."""

    forward_s: float
    backward_s: float


def isolated_layer(recipe: Recipe, constants: Constants = BURST) -> LayerSeconds:
    """The MoE half of a layer of `recipe` without its norm and residual, as a benchmark of the module times
    it.

    Raises BadInputError for a dense model.
    """
    moe = recipe.model.moe
    if moe is None:
        raise BadInputError(f"{recipe.model.key}: a dense model has no MoE layer; name one with experts")
    is_quantized = runs_quantized(recipe, None)
    tally = Tally(recipe=recipe, number=NUMBERS[recipe.precision] if is_quantized else Number.BF16)
    add_experts(tally, moe, load=1.0)
    exchanges = expert_exchanges(recipe, moe, tensor_parallel(recipe, is_quantized=is_quantized))
    work = LayerWork(
        operations=tuple(
            operation for operation in tally.operations if getattr(operation, "part", None) is not Part.NORMS
        ),
        messages=tuple(messages_of(tally, exchanges, 1.0)),
        num_launches=tally.num_launches,
    )
    setting = LayerSetting(is_grace=False, overlaps_experts=False, is_graphed=False)
    pricer = Pricer(Efficiency(recipe.system), Fabric(recipe.system, recipe.parallel))
    forward_s, backward_s = layer_times(stack([(pricer.price(work), setting)]), constants).total_s[0]
    return LayerSeconds(forward_s=float(forward_s), backward_s=float(backward_s))
