"""A MoE layer timed alone: what separates it from the same layer inside a long training step.

Alone, kernels run at their burst rate, nothing waits for another rank, and the host is ahead. So the ratio
of a layer in a step to the layer alone is that of the constants: `Constants.sustained_fraction` against 1,
`memory_fraction` against what one kernel reaches, and the stragglers of a step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from moe_bench.analysis.layer_comms import runs_quantized
from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.evidence.rates import MEMORY_HBM_FRACTION
from moe_bench.projection.fabric import Fabric
from moe_bench.projection.layer_time import layer_times
from moe_bench.projection.pricing import LayerSetting, Pricer, stack
from moe_bench.projection.work.experts import add_experts
from moe_bench.projection.work.operations import Gemm, LayerWork, MemoryBound, Number, Part, Pass
from moe_bench.projection.work.tally import NUMBERS, Tally
from moe_bench.spec.recipe import Recipe

BURST = Constants(
    sustained_fraction=1.0,
    sustained_attention_fraction=1.0,
    memory_fraction=MEMORY_HBM_FRACTION,
    launch_s=0.0,
)
"""Constants of a layer alone: rates as microbenchmarks measure them."""


def isolated_parts(
    recipe: Recipe, *, load: float, constants: Constants = BURST
) -> Mapping[tuple[str, str], float]:
    """Seconds of the parts of the MoE half of a layer of `recipe` without its norm, residual and messages, by
    part and pass as records name them.

    `load` is how many rows the rank's experts get over the balanced number. Parts are `router`, `permute and
    unpermute`, `fc1`, `activation`, `fc2` and `shared experts`; passes `forward`, `dgrad` and `wgrad` for the
    products of routed experts, `forward` and `backward` for all else. Raises BadInputError
    for a dense model.
    """
    tally = _tally(recipe, load=load)
    pricer = Pricer(Efficiency(recipe.system), Fabric(recipe.system, recipe.parallel))
    seconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    operations = list(_operations(tally))
    num_products = sum(map(_is_expert_product, operations))
    products = 0
    for operation in operations:
        work = LayerWork(operations=(operation,), messages=(), num_launches=0)
        times = layer_times(stack([(pricer.price(work), _SETTING)]), constants)
        name, in_pass = operation.part.value, operation.in_pass.value
        if _is_expert_product(operation):
            # both projections have as many, biases' included, and the first stands before the second
            name = "fc1" if products < num_products // 2 else "fc2"
            products += 1
        else:
            name = "activation" if operation.part is Part.EXPERTS else name
            in_pass = "forward" if operation.in_pass is Pass.FORWARD else "backward"
        seconds[name, in_pass] += float(times.total_s.sum())
    return dict(seconds)


def _is_expert_product(operation: Gemm | MemoryBound) -> bool:
    return operation.part is Part.EXPERTS and isinstance(operation, Gemm)


_SETTING = LayerSetting(is_grace=False, overlaps_experts=False, is_graphed=False)


def _tally(recipe: Recipe, *, load: float) -> Tally:
    moe = recipe.model.moe
    if moe is None:
        raise BadInputError(f"{recipe.model.key}: a dense model has no MoE layer; name one with experts")
    is_quantized = runs_quantized(recipe, None)
    tally = Tally(recipe=recipe, number=NUMBERS[recipe.precision] if is_quantized else Number.BF16)
    add_experts(tally, moe, load=load)
    return tally


def _operations(tally: Tally) -> Iterator[Gemm | MemoryBound]:
    """What is of the expert half of the layer itself: products and moves but those of norm and residual."""
    for operation in tally.operations:
        if isinstance(operation, Gemm | MemoryBound) and operation.part is not Part.NORMS:
            yield operation
