"""Biases, residual experts and learned positions as operations, counted by hand."""

from __future__ import annotations

from moe_bench.projection.work.lowering import lower
from moe_bench.projection.work.operations import Gemm, LayerWork, MemoryBound, Part, Pass
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import Recipe

LOADER = Loader(root=recipes_root(), rules=())
RECIPE = LOADER.recipe(find_recipe("pr_moe_350m", LOADER))
TOKENS, HIDDEN, FFN, NUM_LOCAL = 4 * 2048, 1024, 4096, 4
"""Of the layers with 32 experts over eight ranks; every rank gets as many rows as it has tokens."""
BF16_BYTES = 2


def layer_with(ffn: str, recipe: Recipe = RECIPE) -> LayerWork:
    """The first kind of layer with this feed-forward half and, where it has experts, `NUM_LOCAL` of them."""
    for kind, work in lower(recipe).kinds.items():
        (structure,) = kind.structures
        moe = recipe.model.at(structure).moe if structure.ffn == "moe" else None
        if structure.ffn == ffn and (moe is None or moe.num_experts == NUM_LOCAL * recipe.parallel.expert):
            return work
    raise AssertionError(ffn)


def moved_bytes(work: LayerWork, part: Part, in_pass: Pass) -> float:
    return sum(
        operation.num_bytes
        for operation in work.operations
        if isinstance(operation, MemoryBound) and (operation.part, operation.in_pass) == (part, in_pass)
    )


def recipe_without(**of_model: bool) -> Recipe:
    return RECIPE.model_copy(update={"model": RECIPE.model.model_copy(update=of_model)})


def test_biases_of_a_dense_mlp_are_read_and_written_forward_and_summed_backward() -> None:
    with_biases, plain = layer_with("dense"), layer_with("dense", recipe_without(linear_bias=False))
    channels = BF16_BYTES * TOKENS * (FFN + HIDDEN)
    for in_pass, passes in ((Pass.FORWARD, 2), (Pass.DGRAD, 1)):
        added = moved_bytes(with_biases, Part.DENSE_MLP, in_pass) - moved_bytes(
            plain, Part.DENSE_MLP, in_pass
        )
        assert added == passes * channels


def test_fused_kernels_add_a_dense_mlps_biases_for_nothing() -> None:
    fusions = RECIPE.kernels.fusions.model_copy(update={"activation": True, "bias_dropout": True})
    kernels = RECIPE.kernels.model_copy(update={"fusions": fusions})
    fused, plain = (
        layer_with("dense", recipe.model_copy(update={"kernels": kernels}))
        for recipe in (RECIPE, recipe_without(linear_bias=False))
    )
    assert moved_bytes(fused, Part.DENSE_MLP, Pass.FORWARD) == moved_bytes(
        plain, Part.DENSE_MLP, Pass.FORWARD
    )


def test_bias_rows_of_experts_are_a_product_with_a_gradient_of_the_biases_alone() -> None:
    products = [
        (one.in_pass, one.num_rows, one.num_inner, one.num_columns)
        for one in layer_with("moe").operations
        if isinstance(one, Gemm) and one.part is Part.EXPERTS and one.num_groups == 1
    ]
    assert products == [
        (Pass.FORWARD, TOKENS, NUM_LOCAL, FFN),
        (Pass.WGRAD, FFN, TOKENS, NUM_LOCAL),
        (Pass.FORWARD, TOKENS, NUM_LOCAL, HIDDEN),
        (Pass.WGRAD, HIDDEN, TOKENS, NUM_LOCAL),
    ]


def test_residual_experts_are_weighed_by_two_logits_made_twice() -> None:
    products = [
        (one.num_rows, one.num_inner, one.num_columns)
        for one in layer_with("moe").operations
        if isinstance(one, Gemm) and one.part is Part.SHARED_EXPERTS and one.in_pass is Pass.FORWARD
    ]
    assert products[2:] == [(TOKENS, HIDDEN, 2)] * 2


def test_learned_positions_rotate_nothing() -> None:
    learned, rotated = layer_with("dense"), layer_with("dense", recipe_without(learned_positions=False))
    queries_and_keys = BF16_BYTES * TOKENS * 2 * HIDDEN
    for in_pass in (Pass.FORWARD, Pass.DGRAD):
        added = moved_bytes(rotated, Part.ATTENTION_PROJECTIONS, in_pass) - moved_bytes(
            learned, Part.ATTENTION_PROJECTIONS, in_pass
        )
        assert added == 3 * 2 * queries_and_keys  # unfused, read and written
