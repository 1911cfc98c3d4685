"""A MoE layer alone, held against Megatron-LM's own timings of one on eight H100."""

from __future__ import annotations

import statistics

import pytest

from moe_bench.analysis.layer_comms import expert_exchanges, runs_quantized, tensor_parallel
from moe_bench.errors import BadInputError
from moe_bench.projection.constants import Constants
from moe_bench.projection.efficiency import Efficiency
from moe_bench.projection.fabric import Fabric
from moe_bench.projection.isolated_layer import BURST, isolated_parts
from moe_bench.projection.layer_time import layer_times
from moe_bench.projection.pricing import LayerSetting, Pricer, stack
from moe_bench.projection.work.experts import add_experts
from moe_bench.projection.work.lowering import messages_of
from moe_bench.projection.work.operations import LayerWork, MemoryBound, Number, Part
from moe_bench.projection.work.tally import NUMBERS, Tally
from moe_bench.results.published import PublishedRow, load_rows
from moe_bench.results.sonicmoe import SHAPES, SonicShape
from moe_bench.spec.catalogue import data_root, find_recipe, recipes_root
from moe_bench.spec.derive_layer import layer_recipe
from moe_bench.spec.load import Loader
from moe_bench.spec.parallel import ParallelSpec
from moe_bench.spec.recipe import KernelSpec, Overlap, Recipe, Recompute

LOADER = Loader(root=recipes_root(), rules=())
ROWS = tuple(row for row in load_rows(data_root() / "results/published") if row.kind == "layer_microbench")
MODELS = {
    "deepseek": ("deepseek_v3/h100_sxm_256g_bf16", 32),
    "mixtral": ("mixtral_8x7b/h100_sxm_64g_bf16", 8),
}


def timed(row: PublishedRow) -> Recipe:
    """The layer of `row`: DeepSeek-V3's with 32 experts, or Mixtral's, over eight GPUs of one node."""
    name, num_experts = MODELS[row.id.split("-")[2]]
    recipe = LOADER.recipe(find_recipe(name, LOADER))
    assert recipe.model.moe is not None
    assert row.dispatcher is not None
    moe = recipe.model.moe.model_copy(update={"num_experts": num_experts})
    return recipe.model_copy(
        update={
            "model": recipe.model.model_copy(update={"moe": moe}),
            "precision": "bf16" if row.precision == "BF16" else "fp8_tensorwise",
            "seq_len": row.seq_len,
            "micro_batch_size": row.mbs,
            "parallel": ParallelSpec(num_gpus=8, expert=8),
            "recompute": Recompute(),
            "overlap": Overlap(),
            "dispatch": recipe.dispatch.model_copy(update={"dispatcher": row.dispatcher}),
        }
    )


def layer_seconds(recipe: Recipe, constants: Constants) -> float:
    """The MoE half of a layer without its norm and residual, messages and launches included, forward and
    backward together, as a benchmark of the module times it.
    """
    assert recipe.model.moe is not None
    is_quantized = runs_quantized(recipe, None)
    tally = Tally(recipe=recipe, number=NUMBERS[recipe.precision] if is_quantized else Number.BF16)
    add_experts(tally, recipe.model.moe, load=1.0)
    parallel = tensor_parallel(recipe, is_quantized=is_quantized)
    norms = [one for one in tally.operations if isinstance(one, MemoryBound) and one.part is Part.NORMS]
    work = LayerWork(
        operations=tuple(one for one in tally.operations if one not in norms),
        messages=tuple(messages_of(tally, expert_exchanges(recipe, recipe.model.moe, parallel), 1.0)),
        num_launches=tally.num_launches,
    )
    pricer = Pricer(Efficiency(recipe.system), Fabric(recipe.system, recipe.parallel))
    setting = LayerSetting(is_grace=False, overlaps_experts=False, is_graphed=False)
    return float(layer_times(stack([(pricer.price(work), setting)]), constants).total_s.sum())


def ratio(row: PublishedRow, constants: Constants = BURST) -> float:
    """Projected over measured time, forward and backward together."""
    metrics = row.metrics
    assert metrics.moe_layer_fwd_ms is not None
    assert metrics.moe_layer_bwd_ms is not None
    return 1e3 * layer_seconds(timed(row), constants) / (metrics.moe_layer_fwd_ms + metrics.moe_layer_bwd_ms)


def test_the_registry_has_twelve_layers_of_two_models() -> None:
    assert len(ROWS) == 12


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_a_layer_at_burst_rates_is_within_a_third_of_its_timing(row: PublishedRow) -> None:
    assert 0.8 < ratio(row) < 1.34


def test_burst_rates_explain_most_of_the_distance_between_a_layer_alone_and_in_a_step() -> None:
    in_a_step = statistics.median(ratio(row, Constants()) for row in ROWS)
    alone = statistics.median(ratio(row) for row in ROWS)
    assert in_a_step > 1.15
    assert abs(alone - 1) < 0.12


def test_a_dense_model_has_no_such_layer() -> None:
    recipe = timed(ROWS[0])
    with pytest.raises(BadInputError, match="dense model"):
        isolated_parts(
            recipe.model_copy(update={"model": recipe.model.model_copy(update={"moe": None})}), load=1.0
        )


def test_the_parts_of_a_layer_on_one_rank_add_up_to_the_layer() -> None:
    case = SHAPES[0].case()
    recipe = layer_recipe(case, LOADER.system("h100_sxm"))
    parts = isolated_parts(recipe, load=1.0)
    assert sum(parts.values()) == pytest.approx(layer_seconds(recipe, BURST))
    assert {part for part, _ in parts} == {"router", "permute and unpermute", "fc1", "activation", "fc2"}
    assert {in_pass for part, in_pass in parts if part == "fc2"} == {"forward", "dgrad", "wgrad"}


def test_a_rank_with_twice_the_load_has_twice_the_rows_in_its_products() -> None:
    recipe = layer_recipe(SHAPES[-1].case(), LOADER.system("h100_sxm"))
    even, twice = (isolated_parts(recipe, load=load) for load in (1.0, 2.0))
    assert twice["fc1", "forward"] / even["fc1", "forward"] == pytest.approx(2, rel=0.1)
    assert twice["router", "forward"] == even["router", "forward"]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_the_forward_pass_of_sonicmoes_layers_is_near_what_they_measured_of_megatron(
    shape: SonicShape,
) -> None:
    plain = shape.case().with_kernels(KernelSpec(family="torch_native"))
    parts = isolated_parts(layer_recipe(plain, LOADER.system("h100_sxm")), load=1.0)
    forward_s = sum(seconds for (_, in_pass), seconds in parts.items() if in_pass == "forward")
    rows, hidden, ffn = (
        shape.num_tokens * shape.top_k,
        shape.hidden_size,
        shape.expert_ffn_hidden_size,
    )
    projected_ratio = 6 * rows * hidden * ffn / forward_s / shape.megatron.forward_flops_per_s
    assert 0.8 < projected_ratio < 1.3
