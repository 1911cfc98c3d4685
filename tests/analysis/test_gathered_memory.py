"""What experts hold that gather their rows, counted by hand for one layer."""

from __future__ import annotations

from moe_bench.analysis.expert_memory import ExpertHalf
from moe_bench.analysis.layer_sizes import expert_sizes, layer_sizes
from moe_bench.analysis.live_tensors import LiveTensors, Made
from moe_bench.spec.catalogue import find_recipe, recipes_root
from moe_bench.spec.load import Loader
from moe_bench.spec.recipe import DispatchSpec, KernelSpec, Recipe, Recompute

TOKENS, HIDDEN, FFN, TOP_K = 4096, 2048, 768, 8
BF16 = 2


def qwen(*, family: str, expert: int) -> Recipe:
    loader = Loader(root=recipes_root())
    recipe = loader.recipe(find_recipe("qwen3_30b_a3b/h100_sxm_16g_bf16_alltoall", loader))
    return recipe.model_copy(
        update={
            "kernels": KernelSpec.model_validate({"family": family}),
            "parallel": recipe.parallel.model_copy(update={"expert": expert}),
            "dispatch": DispatchSpec(dispatcher="alltoall"),
            "micro_batch_size": 1,
            "recompute": Recompute(),
        }
    )


def kept_bytes(recipe: Recipe) -> dict[str, int]:
    """By name, what the expert half leaves for the backward pass."""
    moe, sizes = recipe.model.moe, layer_sizes(recipe)
    assert moe is not None
    half, live = ExpertHalf(recipe, moe, sizes, load=1.0), LiveTensors(Made.FORWARD)
    live.make("mlp_input", sizes.vector_bytes)
    half.forward(live)
    return live.sizes


def test_one_rank_keeps_the_pre_activation_of_its_rows_and_no_copy_of_its_tokens() -> None:
    kept = kept_bytes(qwen(family="quack", expert=1))
    assert kept["expert_up"] == BF16 * TOKENS * TOP_K * 2 * FFN
    assert not {"expert_input", "expert_hidden", "permuted_rows"} & kept.keys()


def test_several_ranks_keep_the_rows_as_they_arrived_and_do_not_sort_them() -> None:
    recipe = qwen(family="quack", expert=16)
    assert recipe.model.moe is not None
    kept = kept_bytes(recipe)
    assert kept["expert_input"] == BF16 * TOKENS * TOP_K * HIDDEN
    assert not expert_sizes(recipe, recipe.model.moe, layer_sizes(recipe)).sorts_rows


def test_the_permuted_copy_and_the_activation_are_what_is_saved() -> None:
    gathered, grouped = (kept_bytes(qwen(family=family, expert=1)) for family in ("quack", "torch_native"))
    rows = TOKENS * TOP_K
    experts = {"row_map", "probs"}
    saved = sum(grouped.values()) - sum(gathered.values())
    integers = sum(grouped.get(name, 0) - gathered.get(name, 0) for name in experts)
    assert saved - integers == BF16 * rows * (HIDDEN + FFN)
