"""What the experts' rows move between router and products, counted by hand."""

from __future__ import annotations

import pytest

from moe_bench.projection.work.lowering import lower
from moe_bench.projection.work.operations import MemoryBound, Part, Pass
from moe_bench.projection.work.traits import MEGATRON, Traits
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader

TOKENS, HIDDEN, TOP_K = 4 * 4096, 2048, 8
BF16_BYTES = 2


def permuted_bytes(*changes: str) -> float:
    """Bytes that one layer moves forward to put tokens in rows and rows in tokens."""
    loader = Loader(root=recipes_root(), rules=())
    recipe = loader.recipe(find_recipe("olmoe_1b_7b/h100_sxm_8g_bf16_quack", loader), changes=changes)
    (layer,) = lower(recipe).kinds.values()
    return sum(
        operation.num_bytes
        for operation in layer.operations
        if isinstance(operation, MemoryBound)
        and operation.part is Part.PERMUTATION
        and operation.in_pass is Pass.FORWARD
    )


def test_experts_that_gather_read_their_rows_once_and_write_the_tokens() -> None:
    assert permuted_bytes() == BF16_BYTES * HIDDEN * TOKENS * (TOP_K + 1)


def test_what_is_permuted_is_read_and_written_both_ways() -> None:
    assert permuted_bytes("kernels.family=torch_native") == BF16_BYTES * HIDDEN * 2 * TOKENS * (TOP_K + 1)


def test_rows_that_arrive_from_others_are_added_up_in_their_order() -> None:
    sent = BF16_BYTES * HIDDEN * 2 * TOKENS * (TOP_K + 1)
    assert permuted_bytes("parallel.expert=8") == sent + BF16_BYTES * HIDDEN * 2 * TOKENS * TOP_K


@pytest.mark.parametrize(
    ("precision", "per_tensor"),
    [("fp8_tensorwise", 4), ("fp8_blockwise", 1), ("fp8_delayed", 0), ("bf16", 0)],
)
def test_each_expert_starts_the_kernels_that_quantize_its_four_tensors(
    precision: str, per_tensor: int
) -> None:
    loader = Loader(root=recipes_root(), rules=())
    path = find_recipe("qwen3_30b_a3b/h100_sxm_16g_fp8_tensorwise", loader)

    def launches(form: str, expert_ranks: int) -> float:
        changes = (f"precision={form}", f"parallel.expert={expert_ranks}")
        (layer,) = lower(loader.recipe(path, changes=changes)).kinds.values()
        return layer.num_launches

    for expert_ranks in (8, 16):
        added = launches(precision, expert_ranks) - launches("bf16", expert_ranks)
        assert added == 4 * per_tensor * 128 / expert_ranks


def moved_bytes(name: str, part: Part, in_pass: Pass, traits: Traits, *changes: str) -> float:
    """Bytes that layers of a recipe move for one part in one pass."""
    loader = Loader(root=recipes_root(), rules=())
    recipe = loader.recipe(find_recipe(name, loader), changes=changes)
    return sum(
        operation.num_bytes
        for layer in lower(recipe, traits=traits).kinds.values()
        for operation in layer.operations
        if isinstance(operation, MemoryBound) and operation.part is part and operation.in_pass is in_pass
    )


def test_recomputation_that_stops_early_does_not_put_rows_back_into_tokens() -> None:
    changes = ("recompute.granularity=full", "recompute.method=uniform", "recompute.num_layers=1")
    early = Traits(stops_recompute_early=True)
    forward, whole, cut = (
        moved_bytes("qwen3_30b_a3b/h100_sxm_16g_bf16", Part.PERMUTATION, in_pass, traits, *changes)
        for in_pass, traits in (
            (Pass.FORWARD, MEGATRON),
            (Pass.RECOMPUTE, MEGATRON),
            (Pass.RECOMPUTE, early),
        )
    )
    assert whole == forward
    assert cut == forward / 2


def test_biases_inside_of_the_products_move_nothing() -> None:
    name, fused = "gpt_oss_120b/h100_sxm_64g_bf16", Traits(fuses_expert_biases=True)
    apart, within = (moved_bytes(name, Part.EXPERTS, Pass.FORWARD, traits) for traits in (MEGATRON, fused))
    loader = Loader(root=recipes_root(), rules=())
    recipe = loader.recipe(find_recipe(name, loader))
    rows = recipe.micro_batch_size * recipe.seq_len * 4
    # the bias times its probability in FP32, the sum, and the cast to BF16; layers with a window and without
    assert apart - within == 2 * 28 * rows * recipe.model.hidden_size
